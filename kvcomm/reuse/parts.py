"""The parts of approximate reuse, put together for one engine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from typing import Self

from kvcomm.align.attention_mass import looking_layers
from kvcomm.align.bank import AnchorStore, BankShape
from kvcomm.align.estimators import Estimator, RotateEstimator, TokenEstimator, TokenSettings
from kvcomm.align.ladder import ATTENTION
from kvcomm.align.levels import ReaderBook
from kvcomm.align.ops.choice import make_ops
from kvcomm.align.ops.contract import Ops
from kvcomm.align.prior import Prior
from kvcomm.align.profile_file import Profile, load_profile, save_profile
from kvcomm.align.sketch import Sketcher, SketchSettings
from kvcomm.align.spans import layer_stores
from kvcomm.config import EngineConfig
from kvcomm.errors import AnchorFileForeign, InvalidRequest
from kvcomm.memory.memory import Memory
from kvcomm.memory.pool import PageIds
from kvcomm.memory.renditions import Rendition
from kvcomm.memory.segments import Segment
from kvcomm.model.cache_folder import cache_root
from kvcomm.model.geometry import ModelGeometry
from kvcomm.model.runner import ModelRunner
from kvcomm.reuse.asked import Asked
from kvcomm.reuse.attempt import AttemptTools
from kvcomm.reuse.choosing import AttentionChooser, Chooser
from kvcomm.reuse.cost import ReuseCost, cached_cost, machine_label, measure_cost
from kvcomm.reuse.idle_work import IdleWork, Job, Steps, Urgency
from kvcomm.reuse.learner import Learner
from kvcomm.reuse.planner import Planner
from kvcomm.reuse.repair import Repairer
from kvcomm.reuse.replay import Replayer
from kvcomm.reuse.sketching import SketchAhead
from kvcomm.reuse.trials import Trials


@dataclass(frozen=True, eq=False)
class ReuseParts:
    """What plans, learns, replays and works beside requests, and what it has learned.

    Attributes:
        num_looking_heads: heads by which rungs choose tokens; weights have one entry for each.
        lock: the engine's, which guards all of it; not held while files are read or written.
        estimation: digest of settings of estimators and sketches other than the defaults; empty: all are. Part of the
            namespace of files, since anchors and pairs hold for these settings only.
    """

    ops: Ops
    anchors: AnchorStore
    book: ReaderBook
    cost: ReuseCost
    estimators: dict[str, Estimator]
    choosers: dict[str, Chooser]
    planner: Planner
    replayer: Replayer
    trials: Trials
    learner: Learner
    repairer: Repairer
    idle: IdleWork
    num_looking_heads: int
    lock: RLock
    estimation: str = ""

    @classmethod
    def make(
        cls,
        config: EngineConfig,
        memory: Memory,
        geometry: ModelGeometry,
        runner: ModelRunner,
        lock: RLock,
        identity: str,
        end_token_ids: frozenset[int],
        prior: Prior | None,
    ) -> Self:
        """Make one of these.

        Args:
            identity: of the model, for what was measured on it.
        """
        layers = layer_stores(memory.pool, geometry)
        device = memory.pool.keys[0].device
        ops = make_ops("auto", device)
        sketcher = Sketcher(
            geometry, SketchSettings(num_groups=config.sketch_groups, layers_per_group=config.sketch_layers)
        )
        settings = _token_settings(config, sketcher.num_groups)
        anchors = AnchorStore(
            BankShape.of(geometry, num_groups=sketcher.num_groups, dim=sketcher.settings.dim),
            max_bank_bytes=config.anchor_bytes,
        )
        known: tuple[Estimator, ...] = (TokenEstimator(anchors, sketcher, ops, settings), RotateEstimator(ops))
        estimators = {estimator.name: estimator for estimator in known}
        choosers: dict[str, Chooser] = {ATTENTION: AttentionChooser()}
        label = hashlib.sha256(f"{identity} {machine_label()} {device}".encode()).hexdigest()[:24]
        cost = ReuseCost(
            lambda: cached_cost(
                cache_root() / "cost" / f"{label}.json",
                lambda: measure_cost(memory, runner, layers, ops.rotate, geometry.max_context),
            )
        )
        idle = IdleWork(lock)
        book = ReaderBook() if prior is None else ReaderBook(prior.all_pairs, prior.head_weights)
        planner = Planner(AttemptTools(memory, layers, choosers), estimators, book, cost, immovable=geometry.immovable)
        planner.finder.published = SketchAhead(memory, layers, sketcher, anchors, idle, lock).published
        replayer = Replayer(memory, runner, layers, choosers, lock)
        trials = Trials(memory, planner.finder, replayer, idle, chunk=config.prefill_chunk, end_token_ids=end_token_ids)
        num_heads = sum(geometry.layers[layer_id].num_heads for layer_id in looking_layers(len(layers)))
        return cls(
            ops,
            anchors,
            book,
            cost,
            estimators,
            choosers,
            planner,
            replayer,
            trials,
            Learner(trials, planner, layers),
            Repairer(trials, planner.finder),
            idle,
            num_heads,
            lock,
            _estimation_label(settings, sketcher.settings),
        )

    def add_estimator(self, estimator: Estimator) -> None:
        """Let rungs name one more estimator."""
        self.estimators[estimator.name] = estimator

    def add_chooser(self, chooser: Chooser) -> None:
        """Let rungs name one more chooser."""
        self.choosers[chooser.name] = chooser

    def when_published(self, told: Callable[[str, Segment, Rendition], None]) -> None:
        """Tell one more party of every new rendition of a segment, under the engine's lock."""
        before = self.planner.finder.published

        def published(namespace: str, segment: Segment, rendition: Rendition) -> None:
            if before is not None:
                before(namespace, segment, rendition)
            told(namespace, segment, rendition)

        self.planner.finder.published = published

    def measure_when_idle(self) -> None:
        """Find out what passes take on this machine, unless that is known; on the engine's thread, beside requests."""

        def steps() -> Steps:
            self.planner.prepare()
            yield

        self.idle.add(Job(steps(), release=lambda: None, pages=lambda: (), urgency=Urgency.AWAITED))

    def file_namespace(self, namespace: str) -> str:
        """Whose files these are: the tenant's, and under other settings than the defaults only of engines with them."""
        return hashlib.sha256(f"{namespace} {self.estimation}".encode()).hexdigest() if self.estimation else namespace

    def save(self, folder: Path, namespace: str) -> Profile:
        """Write what a tenant has learned by now. Raises AnchorFileError."""
        with self.lock:  # together: a calibration holds for the anchors of its moment
            banks = [bank.snapshot() for bank in self.anchors.banks(namespace)]
            knowledge = self.book.knowledge(namespace)
        return save_profile(folder, self.file_namespace(namespace), self.anchors.shape, banks, knowledge)

    def load(self, folder: Path, namespace: str) -> Profile:
        """Take over what a folder holds, all of it or nothing, in place of what is known of the same edges and readers.

        Raises AnchorFileError and its subclasses.
        """
        profile = load_profile(folder, namespace=self.file_namespace(namespace), shape=self.anchors.shape)
        too_large = [bank for bank in profile.banks if bank.num_tokens > self.anchors.max_bank_tokens]
        if too_large:
            raise AnchorFileForeign(
                f"{folder} holds a bank of {too_large[0].num_tokens} tokens, this engine keeps "
                f"{self.anchors.max_bank_tokens} an edge: raise anchor_bytes, or learn anew"
            )
        weights = profile.knowledge.head_weights
        if weights is not None and len(weights) != self.num_looking_heads:
            raise AnchorFileForeign(
                f"{folder} holds weights for {len(weights)} heads, of this model {self.num_looking_heads} are looked "
                "at: learn anew"
            )
        with self.lock:
            for bank in profile.banks:
                self.anchors.bank(namespace, bank.edge).replace(bank)
            self.book.put(namespace, profile.knowledge)
        return profile

    def forget(self, namespace: str) -> None:
        """Forget what was learned about moving a tenant's text."""
        self.anchors.forget(namespace)
        self.book.forget(namespace)

    def pages_held(self, requests: Iterable[Asked]) -> Iterator[PageIds]:
        """Every page reference that moves, idle work and replays hold, for integrity checks."""
        yield from self.planner.pages_held(requests)
        yield from self.idle.pages_held()
        yield from self.replayer.pages_held()


def _token_settings(config: EngineConfig, num_groups: int) -> TokenSettings:
    """Raises InvalidRequest if there are several factors, but not one per group of layers."""
    if len(config.alpha) == 1:
        return TokenSettings(k=config.neighbors, alpha=config.alpha[0])
    if len(config.alpha) != num_groups:
        raise InvalidRequest(
            f"alpha={config.alpha!r} must be one factor or one for each of {num_groups} groups of layers"
        )
    return TokenSettings(k=config.neighbors, alphas=config.alpha)


def _estimation_label(token: TokenSettings, sketch: SketchSettings) -> str:
    if (token, sketch) == (TokenSettings(), SketchSettings()):
        return ""
    return hashlib.sha256(json.dumps([token, sketch]).encode()).hexdigest()
