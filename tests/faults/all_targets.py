"""All targets: what reads text, and what reads the files of models, runs and caches."""

from tests.faults.file_targets import FILE_TARGETS
from tests.faults.targets import TARGETS

ALL_TARGETS = (*TARGETS, *FILE_TARGETS)
