"""The one error tree.

Every error a caller can meet derives from `KVCommError`, names the offending value and, where there is one,
the way out. Our own broken invariants stay `AssertionError`.

    KVCommError
    +- InvalidRequest (also ValueError)   the caller's input: prompt, sampling, segments, config
    |  +- EmptyPrompt
    |  +- PromptTooLong
    |  +- UnknownToken
    |  +- TemplateError                   placeholders, cycles, missing inputs of an agent group
    |  +- UnknownAdapter                  no adapter of that name has been loaded
    +- ContextReleased                    a context was used after release()
    +- ContextBusy                        a context already has a request in flight
    +- PoolExhausted                      no free page now; carries the numbers
    |  +- PoolTooSmall                    would not fit even an empty pool
    |  +- QuotaExceeded                   the tenant's own quota, not the pool, is full
    +- RequestCancelled                   the request was cancelled; what was generated is attached
    +- SourceFailed                       a request whose answer is followed gave none, or not in time
    +- WeightsChanged                     the KV was computed by other weights, or another adapter, than are there now
    +- NumericalError                     NaN or infinite logits
    +- AgentFailed                        an agent of a group could not answer; __cause__ says why
    +- EngineClosed                       the engine was closed, or its loop died
    +- UnsupportedModel                   the model's KV cannot be cached soundly; says why
    +- ModelLoadError                     a model could not be fetched or loaded
    |  +- UnknownModel
    |  +- DownloadError                   offline, registry refused, interrupted
    |  +- HashMismatch                    a fetched file is not the pinned one
    |  +- CacheFolderError                full disk, read-only, foreign or truncated cache folder
    +- KeyFileError                       a file of API keys cannot be read, written or understood
    +- MissingExtra                       an optional part of the installation is not there
    +- ServerError                        a running server cannot be reached, or refuses
    +- SnapshotError                      a snapshot file cannot be written or used
    |  +- SnapshotCorrupt                 truncated, bit-flipped or not a snapshot at all
    |  +- SnapshotExists                  the file is there and was not to be replaced
    |  +- SnapshotForeign                 another model, dtype, rope, tokenizer or tenant
    |  +- SnapshotTooNew                  written by a newer format version
    +- TierError                          a shared tier cannot be opened or used as asked
       +- ObjectMissing                   no object of that name is there
       +- StoreFailed                     the store behind a tier did not do what it was asked: gone, full, read-only
       +- RecordError                     what a tier holds under a name cannot be used
          +- RecordCorrupt                truncated, altered, or no record at all
          +- RecordTooNew                 written by a newer format version
"""

from __future__ import annotations

import copy


class KVCommError(Exception):
    """Base of every error kvcomm raises on purpose."""


class InvalidRequest(KVCommError, ValueError):
    """The caller's input cannot be served as given."""


class EmptyPrompt(InvalidRequest):
    """A prompt, text or segment list without a single token."""


class PromptTooLong(InvalidRequest):
    """Prompt plus requested output exceeds the model's context length."""


class UnknownToken(InvalidRequest):
    """A token id outside the model's vocabulary."""


class TemplateError(InvalidRequest):
    """A prompt template and its inputs do not fit together; names the agent and the placeholder."""


class UnknownAdapter(InvalidRequest):
    """No adapter of that name has been loaded into the model."""


class WeightsChanged(KVCommError):
    """The model's weights or adapters are not those that the KV at hand was computed by, or changed meanwhile."""


class ContextReleased(KVCommError):
    """A context was used after it was released."""


class ContextBusy(KVCommError):
    """A context has a request in flight; fork it, or wait for the request."""


class PoolExhausted(KVCommError):
    """The page pool has too few free pages right now."""


class PoolTooSmall(PoolExhausted):
    """The request needs more pages than the whole pool has."""


class QuotaExceeded(PoolExhausted):
    """The tenant's quota is used up although the pool has room."""


class RequestCancelled(KVCommError):
    """The request was cancelled before it finished."""


class SourceFailed(KVCommError):
    """A request whose answer an open prompt follows failed, was cancelled, or did not end in time."""


class NumericalError(KVCommError):
    """The model produced NaN or infinite logits."""


class AgentFailed(KVCommError):
    """An agent could not answer, so its group's run was stopped; `__cause__` says why.

    Attributes:
        agent: the agent's name.
        round: the round it was answering in.
    """

    def __init__(self, agent: str, round: int, cause: BaseException) -> None:
        super().__init__(f"agent {agent!r} failed in round {round}: {type(cause).__name__}: {cause}")
        self.agent = agent
        self.round = round
        self.__cause__ = cause

    def __reduce__(self) -> tuple[type[AgentFailed], tuple[str, int, BaseException | None]]:
        return type(self), (self.agent, self.round, self.__cause__)


class EngineClosed(KVCommError):
    """The engine is closed; create a new one."""


class UnsupportedModel(KVCommError):
    """The KV of this model cannot be cached soundly."""


class ModelLoadError(KVCommError):
    """A model could not be fetched, converted or loaded."""


class UnknownModel(ModelLoadError):
    """Neither a packaged name nor a folder nor a reachable hub id."""


class DownloadError(ModelLoadError):
    """Fetching failed: offline, refused or interrupted."""


class HashMismatch(ModelLoadError):
    """A fetched file is not the pinned one."""


class CacheFolderError(ModelLoadError):
    """The user's cache folder cannot be written, or what lies in it is foreign or incomplete."""


class KeyFileError(KVCommError):
    """A file of API keys cannot be read, written or understood."""


class MissingExtra(KVCommError):
    """An optional part of the installation is needed and not there; names the extra to install."""


class ServerError(KVCommError):
    """A running server cannot be reached, or refuses what is asked; carries its own words where it has some."""


class SnapshotError(KVCommError):
    """A snapshot could not be written or used."""


class SnapshotCorrupt(SnapshotError):
    """Truncated, altered, or not a snapshot at all."""


class SnapshotExists(SnapshotError):
    """There is a file of that name, and it was not to be replaced."""


class SnapshotForeign(SnapshotError):
    """Made under another namespace: model, dtype, rope, tokenizer or tenant differ."""


class SnapshotTooNew(SnapshotError):
    """Written by a newer format version than this one reads."""


class AnchorFileError(KVCommError):
    """A file of anchors could not be written or used."""


class AnchorFileCorrupt(AnchorFileError):
    """Truncated, altered, or not a file of anchors at all."""


class AnchorFileForeign(AnchorFileError):
    """Measured under another namespace: model, dtype, rope, tokenizer or tenant differ."""


class AnchorFileTooNew(AnchorFileError):
    """Written by a newer format version than this one reads."""


class AnchorFileTooOld(AnchorFileError):
    """Written by an earlier version, about what is not kept in this way any more."""


class TierError(KVCommError):
    """A shared tier cannot be opened, or not be used as asked."""


class ObjectMissing(TierError):
    """No object of that name is in the store, or not any more."""


class StoreFailed(TierError):
    """The store behind a tier did not do what it was asked: it is gone, full, read-only or slow, or refuses."""


class RecordError(TierError):
    """What a tier holds under a name cannot be used."""


class RecordCorrupt(RecordError):
    """Truncated, altered, or not a record of a tier at all."""


class RecordTooNew(RecordError):
    """Written by a newer format version than this one reads."""


def kept(error: BaseException) -> BaseException:
    """The same error without its traceback, whose frames know whatever their callers had forgotten since."""
    try:
        return copy.copy(error)
    except Exception:  # of a class of somebody else's
        return KVCommError(f"{type(error).__name__}: {error}")


def first_line(error: BaseException) -> str:
    """Of what another library's error says; the name of its type where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__
