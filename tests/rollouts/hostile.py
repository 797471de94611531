"""Answers that earned something somewhere, or hung somebody's verifier, and must earn nothing here, at once
(alignment.md 8.3)."""

from __future__ import annotations

HOSTILE = [
    "", " ", "\n\n", "<think></think><answer></answer>", "<think> </think><answer>3/4</answer>", "</answer>",
    "<think>a<think>b</think></think><answer>3/4</answer>", "<answer>3/4</answer><think>a</think>",
    "<think>a</think><answer>3/4</answer><answer>1</answer>", "<think>a</think><answer>1</answer><answer>3/4</answer>",
    "<think>3/4</think>", "<think>a</think><answer>3/4", "<THINK>a</THINK><ANSWER>3/4</ANSWER>",
    "<think>a</think><answer>3/4</answer> and more", "0123456789", "0 1 2 3 4 5 6 7 8 9", "9**9**9**9", "(" * 10**6,
    "9" * 10**5, "__import__('os').system('true')", "1/0", "1e999", "nan", "inf", "-inf", "0x10", "1_000", "0072",
    "000", "+-+-1", "７２", "¾", "1\u200b32", "c\u200bba", "257+3", "25+25-3-1", "7*7-3", "12", "1", "72 72", "#### ",
    "####72####", "#### 7 2", "#", ";;;#3", "#3#3", "3*4=5;;#3", "a;#3", "\ufffd\ufffd", "#### 72\x00", "46\u0661",
    "reverse(abc)=cba", "47+85=132", "The answer is 72", "cba cba", "CBA",
    "(" * 99_999, "1," * 49_000, "9+" * 49_000, "####" * 24_000, ";" * 99_999, "1+1=2;" * 16_000, "<think>" * 14_000,
    "<think>a</think>" + " " * 99_000, "<think>" + "a" * 99_000, " " * 99_999, "####" + "0" * 99_000, "-" * 99_999,
    "1/" * 49_000, "1" * 49_000 + "/" + "1" * 49_000, "1,000" * 19_000, "#" * 99_999,
]  # fmt: skip
