"""The exceptions of faceshards, and the exit codes that they lead to.

FaceShardsError
├── UserError            the call, the config or the machine is wrong: exit 2, nothing was written
│   ├── ConfigError      an unknown key, a value out of range, an unknown name
│   ├── SourceError      SHARDS that does not exist, unreadable or incomplete metadata
│   ├── WeightsError     a model file missing, with a wrong hash, or under an unaccepted licence
│   ├── PlanError        steps that do not fit together, resources that are not there
│   └── OutputError      OUT cannot be written, or holds a dataset of another plan
├── ShardError           one shard failed; the others are done and kept: exit 3
├── LostError            nothing more can be done (OUT is full or gone, the workers' node died): the run stops, exit 3
├── CorruptShardError    a published file does not match its manifest
└── ContractError        a stage broke its own declaration: a bug in the stage, never in the data

RemoteError is an OSError, as trouble with a local disk is.
"""

import re
from enum import IntEnum


class ExitCode(IntEnum):
    OK = 0
    USER_ERROR = 2
    SHARDS_FAILED = 3
    INTERRUPTED = 130


class FaceShardsError(Exception):
    """Base of all errors that faceshards raises on purpose."""


class UserError(FaceShardsError):
    """Something that the user can put right; the message says how, in one sentence."""


class ConfigError(UserError):
    """An unknown config key or name, or a value that the field does not allow."""


class SourceError(UserError):
    """SHARDS names something that does not exist or cannot be read as metadata."""


class WeightsError(UserError):
    """A model file is missing, does not match its sha256, or its licence was not accepted."""

    def __init__(self, message: str, details: str = "") -> None:
        """`details` are lines to show below the sentence: which files, and where each belongs."""
        super().__init__(message)
        self.details = details


class PlanError(UserError):
    """The steps of a plan do not fit together, or a resource that it needs is absent."""


class OutputError(UserError):
    """OUT cannot be written, or was made under another plan."""


class ShardError(FaceShardsError):
    """A shard could not be finished; a rerun tries it again."""


class LostError(FaceShardsError):
    """What the whole run needs is gone (room in OUT, OUT itself, the workers' node); a rerun goes on from there."""


class CorruptShardError(FaceShardsError):
    """A published file does not match its manifest; names the file, and the key where known."""


class ContractError(FaceShardsError):
    """A stage returned other columns, rows or reasons than it declares."""


class RemoteError(OSError):
    """What lies behind a URL cannot be reached, or is refused; the message names the URL."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message without full stop and the system's number, or its type when it has none."""
    text = re.sub(r"^\[Errno -?\d+\] ", "", str(error).strip().split("\n", 1)[0]).rstrip(" .")
    return text or ("no answer in time" if isinstance(error, TimeoutError) else type(error).__name__)


def is_gpu_full(error: BaseException) -> bool:
    """Whether it is torch's of a full GPU, for which torch is not imported; Ray's of that name is of the host's."""
    return isinstance(error, RuntimeError) and type(error).__name__ == "OutOfMemoryError"
