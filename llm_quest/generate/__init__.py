"""Second floor: from prompts to texts. `sampling` says what is drawn, `until` when a row ends, `text` how tokens become
text without splitting a character or a stop string, `decoding` how the model is driven, `generate` ties them together.

The front door's function bears the room's name, and Python hangs the room beside it in `llm_quest` as soon as anybody
imports from here. So the room can be called: `quest.generate(...)` is the function, whichever of the two came first.
"""

import sys
from types import ModuleType

from llm_quest.generate.generate import generate


class CallableRoom(ModuleType):
    """A module that does what the function of its name does."""

    __call__ = staticmethod(generate)


sys.modules[__name__].__class__ = CallableRoom
