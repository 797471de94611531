"""Tools: schemas are transformers', and chat templates show them to a policy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest

from llm_quest.data.chat import ChatTemplate
from llm_quest.data.document import DropReport
from llm_quest.data.problems.problem import Problem
from llm_quest.data.prompt_rows import read_prompt_rows
from llm_quest.data.records import Record
from llm_quest.errors import UsageError
from llm_quest.hub.load_tokenizer import load_tokenizer
from llm_quest.recipes.environment_setup import start_environment
from llm_quest.recipes.policy_prompts import PromptEncoder
from llm_quest.rollouts.environments import EnvironmentHost, Step
from llm_quest.rollouts.included_environments import calc, read_tool_calls, search
from llm_quest.rollouts.tool_schema import function_schema, tool_schemas
from tests.later import Later
from tests.recipes.tuned import base

chat_template_utils = Later("transformers.utils.chat_template_utils")

TOOLS_FILE = '''
def multiply(a: int, b: int = 2) -> int:
    """Multiply two numbers.

    Args:
        a: the first
        b: the second
    """
    return a * b
'''
TEMPLATE = (
    "{{ bos_token }}{% if tools %}tools: {{ tools | tojson }}\n{% endif %}{% for m in messages %}{{ m.role }}: "
    "{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def plain(number: int, text: str) -> str:
    """Do a thing.

    And say more about it.

    Args:
        number: how often it is done
        text: what is done,
            over two lines
    """
    return text * number


def optional(one: float | None, many: list[int], kind: Literal["a", "b"] = "a", more: dict | None = None) -> bool:
    """Has arguments of other types.

    Args:
        one: a number
        many: numbers
        kind: one of two
        more: anything

    Returns:
        whether it is so
    """
    return bool(one and many and kind and more)


@pytest.mark.parametrize("function", [plain, optional, calc, search])
def test_a_schema_is_what_transformers_makes_of_the_function(function: Any):
    ours, theirs = function_schema(function)["function"], chat_template_utils.get_json_schema(function)["function"]
    assert ours["name"] == theirs["name"]
    assert ours["description"] == theirs["description"]
    assert ours["parameters"]["required"] == theirs["parameters"]["required"]
    for name, kind in theirs["parameters"]["properties"].items():
        mine = ours["parameters"]["properties"][name]
        assert {key: mine.get(key) for key in ("type", "enum", "items")} == {
            key: kind.get(key) for key in ("type", "enum", "items")
        }, name
        assert mine["description"].split() == kind["description"].split()


def test_a_function_that_a_model_would_have_to_guess_is_refused():
    def bare(x: int) -> int:
        return x

    def untold(x: int) -> int:
        """Does a thing."""
        return x

    with pytest.raises(UsageError, match="the tool bare has no docstring"):
        function_schema(bare)
    with pytest.raises(UsageError, match="the argument x of the tool untold needs a line under Args"):
        function_schema(untold)
    with pytest.raises(UsageError, match="a tool is 3; give a function"):
        tool_schemas([3])


def test_a_template_shows_the_tools_of_a_row_and_of_an_environment(tmp_path: Path):
    tokenizer = load_tokenizer(base(tmp_path / "base"))
    encode = PromptEncoder(tokenizer, ChatTemplate(tokenizer, TEMPLATE), "")
    rows = [{"prompt": "say cat", "tools": [function_schema(calc)]}, {"prompt": "say cat"}]
    with_tools, without = (
        row.to_problem("plain", "strict")
        for row in read_prompt_rows([Record(one, "f:1") for one in rows], DropReport())
    )
    shown, hidden = (tokenizer.decode(ids) for ids in encode.encode_problems([with_tools, without]))
    assert json.loads(shown.split("tools: ")[1].split("\n")[0])[0]["function"]["name"] == "calc"
    assert "tools" not in hidden
    assert encode.shows_tools()
    assert not PromptEncoder(tokenizer, ChatTemplate(tokenizer, TEMPLATE.replace("tools", "stuff")), "").shows_tools()
    assert encode(Problem("say cat", "", "equal", "k", tools=with_tools.tools)) == encode(with_tools)


def test_functions_are_tools_that_are_called_in_a_process_of_their_own(tmp_path: Path):
    (tmp_path / "my_tools.py").write_text(TOOLS_FILE)
    reference = f"{tmp_path}/my_tools.py:multiply"
    client = start_environment("functions", {"functions": [reference]}, timeout_seconds=20, log=print)
    assert [one["function"]["name"] for one in client.tools] == ["multiply"]
    client.reset([{"prompt": "6 x 7?", "answer": "42"}] * 4)
    call = '<tool_call>{"name": "multiply", "arguments": {"a": 6, "b": 7}}</tool_call>'
    found = client.step({0: call, 1: "42", 2: '{"name": "add", "parameters": {}}', 3: "<answer>41</answer>"})
    assert found[0] == Step([{"role": "tool", "content": "42"}], 0.0, False)
    assert found[1] == Step([], 1.0, True)
    assert found[2].messages[0]["content"] == "error: there is no such tool; call one of multiply"
    assert found[3] == Step([], 0.0, True)
    wrong = client.step({0: call.replace('"b"', '"c"')})[0]
    assert "error: TypeError" in wrong.messages[0]["content"]


def test_calls_are_read_as_published_models_write_them():
    assert read_tool_calls('I compute. <tool_call>\n{"name": "a"}\n</tool_call>')[0] == {"name": "a"}
    assert read_tool_calls('{"name": "a", "parameters": {"x": 1}}')[0]["parameters"] == {"x": 1}
    assert read_tool_calls("<tool_call>{broken}</tool_call>") == [None]
    assert read_tool_calls("the answer is 42") == []


def test_an_environment_without_tools_shows_none():
    assert EnvironmentHost(lambda: object()).answer(("tools", None)) == ()  # type: ignore[arg-type,return-value]
