"""One Optuna study as a ledger: who times what, what came out, and whether the one who took it still lives.

Several workers, on as many GPUs and hosts as one likes, keep one ledger. A schedule is *claimed* by a trial
in state RUNNING that is created with its parameters and its worker in one write; trials are numbered in the
order in which they were written, so of two claims of one schedule the lower number holds and the other one is
withdrawn. So nothing is done twice, and no worker need talk to another.

Optuna's own heartbeats are sent inside ``Study.optimize`` and exist for databases alone. A worker here counts
aloud in an attribute of the study, whatever the storage: one whose count has stood still for ``GRACE_S`` of
the onlooker's own clock is dead (no clocks are compared), and one of the same machine whose process is gone
is dead at once. What a dead worker had claimed is taken up by whoever sees it first.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from pagedgen.autotune.grid import Grid
from pagedgen.autotune.outcome import Outcome
from pagedgen.errors import InvalidValue, MalformedFile, StudyForeign, StudyUnreachable, ToolMissing
from pagedgen.values import codec
from pagedgen.values.record import Record
from pagedgen.values.schedule import Schedule

CONSTRAINT = "works"  # of a trial; above 0 when the schedule did not compile or was wrong
BEAT_S = 10.0
GRACE_S = 45.0
ANSWER_S = 10  # for a database to answer
MOST_LOST = 2  # workers that a schedule may take along before it is given up
MADE_TRIES = 8  # of opening a database whose tables others are making
PAUSES_S = (0.5, 2.0, 8.0)  # between tries of a storage that does not answer in the middle of a run
LIVE = (TrialState.RUNNING, TrialState.COMPLETE)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a study is kept: a database's URL or a journal file's path, and the study's name there."""

    storage: str
    name: str


@dataclass(frozen=True, slots=True)
class State:
    """A ledger at one moment: outcomes in the order in which trials were begun, what others are timing.

    ``spent`` counts the trials that were evaluated or are being so: what is bounded. ``known`` ones, from
    elsewhere, are free.
    """

    outcomes: tuple[Outcome, ...]
    running: tuple[Schedule, ...]
    spent: int
    known: int


@dataclass(frozen=True, slots=True)
class _Payload:
    records: tuple[Record, ...]


class Ledger:
    """A study over the schedules of a grid, as one worker sees it.

    >>> ledger = Ledger(grid)                          # of this process alone, in memory
    >>> ledger = Ledger(grid, Place("study.log", "llama-3-8b"), {"spec": "…"})  # doctest: +SKIP

    Args:
        grid: of all legal schedules, so that all workers agree on the parameters.
        place: None keeps the study in memory.
        identity: what the study is about; a study that is there with another one is refused.

    Raises:
        InvalidValue: not a URL of a database and not a path.
        StudyUnreachable: the storage does not answer, or cannot be written.
        StudyForeign: the study of this name is about something else.
        MalformedFile: the path is a file, but no journal.
        ToolMissing: a database's driver is not installed.
    """

    def __init__(
        self, grid: Grid, place: Place | None = None, identity: Mapping[str, str] | None = None
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.grid, self.place, self._identity = grid, place, dict(identity or {})
        self.worker = f"{_machine()}/{_process(os.getpid())}/{secrets.token_hex(4)}"
        self._open: dict[Schedule, Trial] = {}
        self._read: dict[int, Outcome] = {}  # by the number of the trial: a finished one never changes
        self._seen: dict[str, tuple[Any, float]] = {}  # a worker's count, and when it changed, by our clock
        self._stop = threading.Event()
        self._beating: threading.Thread | None = None
        if place is None:
            self._study = optuna.create_study()
            return
        self._storage = open_storage(place.storage)
        self._study = self._opened(place.name)
        self._check(self._study)
        self._beat(0)
        self._beating = threading.Thread(target=self._count_aloud, daemon=True, name="pagedgen-ledger")
        self._beating.start()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Withdraw what is claimed and not told, and stop counting."""
        with contextlib.suppress(StudyUnreachable):
            for schedule in list(self._open):
                self._withdraw(self._open.pop(schedule).number)
        self._stop.set()
        if self._beating is not None:
            self._beating.join()
            self._beating = None

    @property
    def shared(self) -> bool:
        """Whether other workers may keep this ledger as well."""
        return self.place is not None

    @property
    def study(self) -> Study:
        """Optuna's study, for plots."""
        return self._study

    # ---- what is known ----

    def state(self) -> State:
        """All of it, as it was at one moment."""
        found: dict[Schedule, Outcome] = {}
        running = []
        spent = known = 0
        for trial in self._trials():
            spent += trial.state in LIVE and not _known(trial)
            known += _known(trial)
            schedule = self._schedule(trial)
            if schedule is None:
                continue
            if trial.state is TrialState.COMPLETE:
                if trial.number not in self._read:
                    self._read[trial.number] = _outcome(schedule, trial)
                found.setdefault(schedule, self._read[trial.number])
            elif trial.state is TrialState.RUNNING and trial.user_attrs.get("worker") != self.worker:
                running.append(schedule)
        return State(tuple(found.values()), tuple(running), spent, known)

    def outcomes(self) -> tuple[Outcome, ...]:
        """Every outcome, in the order in which trials were begun."""
        return self.state().outcomes

    def running(self) -> tuple[Schedule, ...]:
        """What others are timing now."""
        return self.state().running

    def spent(self) -> int:
        """Trials that were evaluated or are being so."""
        return self.state().spent

    # ---- what this worker does ----

    def preload(self, outcomes: Sequence[Outcome]) -> None:
        """Enter what is known from elsewhere, where the study does not have it yet."""
        have = {self._schedule(t) for t in self._trials() if t.state in LIVE}
        for outcome in outcomes:
            if outcome.schedule not in have:
                have.add(outcome.schedule)
                self._add(outcome.schedule, TrialState.COMPLETE, outcome)

    def claim(self, schedules: Sequence[Schedule], limit: float = float("inf")) -> tuple[Schedule, ...]:
        """Take schedules, those excepted that another one has, and those beyond ``limit`` trials in all."""
        for wanted in schedules:
            self._add(wanted, TrialState.RUNNING)
        first: set[Schedule] = set()
        trials = 0
        won = []
        for trial in self._trials():
            if trial.state not in LIVE or (schedule := self._schedule(trial)) is None:
                continue
            ours = trial.state is TrialState.RUNNING and trial.user_attrs.get("worker") == self.worker
            if ours and schedule not in self._open and (schedule in first or trials >= limit):
                self._withdraw(trial.number)
                continue
            if ours and schedule not in self._open:
                # a frozen trial holds the id that Optuna's Trial takes in a private field
                self._open[schedule] = Trial(self._study, trial._trial_id)
                won.append(schedule)
            first.add(schedule)
            trials += not _known(trial)
        return tuple(won)

    def tell(self, outcome: Outcome) -> bool:
        """Enter the outcome of a claimed schedule; False when it was taken from us, for dead."""
        trial = self._open.pop(outcome.schedule)
        self._read[trial.number] = outcome
        slowest = max((o.time_us for o in self.outcomes() if o.time_us is not None), default=1.0)

        def tell() -> None:
            trial.set_constraint(CONSTRAINT, float(outcome.time_us is None))
            for key, value in _attributes(outcome).items():
                trial.set_user_attr(key, value)
            self._study.tell(trial, outcome.time_us if outcome.time_us is not None else 2 * slowest)

        try:
            self._answered(tell)
        except (ValueError, RuntimeError):  # Optuna's words for a trial that is finished already
            del self._read[trial.number]
            return False
        return True

    def take_up(self) -> tuple[Schedule, ...]:
        """Free what dead workers had claimed, and return it: to be claimed and timed next.

        A schedule that has taken ``MOST_LOST`` workers along is told as one that does not work instead.
        """
        if not self.shared:
            return ()
        freed = []
        lost: dict[Schedule, int] = {}
        for trial in self._trials():
            if (schedule := self._schedule(trial)) is None:
                continue
            if trial.state is TrialState.FAIL and "lost" in trial.user_attrs:
                lost[schedule] = lost.get(schedule, 0) + 1
            worker = trial.user_attrs.get("worker", "")
            if trial.state is not TrialState.RUNNING or worker == self.worker or self.alive(worker):
                continue
            with contextlib.suppress(ValueError, RuntimeError):  # another one was faster
                self._answered(self._bury, trial, worker)
                lost[schedule] = lost.get(schedule, 0) + 1
                freed.append(schedule)
        for schedule in list(freed):
            if lost[schedule] >= MOST_LOST:
                freed.remove(schedule)
                for taken in self.claim([schedule]):
                    self.tell(Outcome(taken, None, f"{lost[schedule]} workers died over it"))
        return tuple(freed)

    def _bury(self, trial: FrozenTrial, worker: str) -> None:
        Trial(self._study, trial._trial_id).set_user_attr("lost", worker)
        self._study.tell(trial.number, state=TrialState.FAIL)

    def alive(self, worker: str) -> bool:
        """Whether a worker still counts; of this machine: whether its process is there."""
        machine, _, rest = worker.partition("/")
        if machine == _machine():
            process = rest.split("/")[0]
            return _process(int(process.split("-")[0])) == process
        count = self._answered(getattr, self._study, "user_attrs").get(_beat_key(worker))
        before, since = self._seen.get(worker, (None, 0.0))
        now = time.monotonic()
        if worker not in self._seen or count != before:
            self._seen[worker] = (count, now)
            return True
        return now - since < GRACE_S

    # ---- the last act, which one worker performs for all ----

    @contextlib.contextmanager
    def last_act(self, pause_s: float = 1.0) -> Iterator[LastAct]:
        """The finalists' timing: one worker gets ``mine``; the others wait and read its result.

        It is done anew when more schedules have been tried since.
        """
        act = LastAct()
        if not self.shared:
            yield act
            return
        assert self.place is not None
        study = self._opened(f"{self.place.name} finalists")
        self._check(study)
        stage = len(self.outcomes())
        number = self._stand(study, stage)
        while number is None:
            holder = self._holder(study, stage)
            if holder is None or (
                holder.state is TrialState.RUNNING and not self.alive(holder.user_attrs["worker"])
            ):
                if holder is not None:
                    with contextlib.suppress(ValueError, RuntimeError):
                        self._answered(study.tell, holder.number, state=TrialState.FAIL)
                number = self._stand(study, stage)
            elif holder.state is TrialState.COMPLETE:
                act.result = codec.decode(
                    _Payload, json.loads(holder.user_attrs["records"]), "records"
                ).records
                break
            else:
                time.sleep(pause_s)
        try:
            yield act
        except BaseException:
            if number is not None:
                with contextlib.suppress(ValueError, RuntimeError, StudyUnreachable):
                    study.tell(number, state=TrialState.FAIL)
            raise
        if number is not None:
            trials = self._answered(study.get_trials, deepcopy=False)
            trial = Trial(study, trials[number]._trial_id)
            best = min((r.time_us for r in act.result), default=1.0)
            self._answered(trial.set_user_attr, "records", _dump(act.result))
            with contextlib.suppress(ValueError, RuntimeError):
                self._answered(study.tell, number, best)

    def _stand(self, study: Study, stage: int) -> int | None:
        """Claim the last act; its number, or None when another one has it."""
        attributes = {"worker": self.worker, "stage": stage}
        self._answered(study.add_trial, create_trial(state=TrialState.RUNNING, user_attrs=attributes))
        mine = None
        for trial in self._answered(study.get_trials, deepcopy=False):
            if trial.state in LIVE and trial.user_attrs.get("stage") == stage:
                if trial.user_attrs.get("worker") == self.worker and trial.state is TrialState.RUNNING:
                    if mine is None:
                        return int(trial.number)
                    self._answered(study.tell, trial.number, state=TrialState.FAIL)
                    return None
                mine = trial.number
        return None

    def _holder(self, study: Study, stage: int) -> FrozenTrial | None:
        for trial in self._answered(study.get_trials, deepcopy=False):
            if trial.state in LIVE and trial.user_attrs.get("stage") == stage:
                return trial
        return None

    # ---- the study ----

    def _opened(self, name: str) -> Study:
        return self._answered(
            optuna.create_study, storage=self._storage, study_name=name, load_if_exists=True
        )

    def _check(self, study: Study) -> None:
        for key, value in self._identity.items():
            stored = self._answered(getattr, study, "user_attrs").get(key)
            if stored is None:
                self._answered(study.set_user_attr, key, value)
            elif stored != value:
                raise StudyForeign(study.study_name, key, str(stored), value)

    def _trials(self) -> list[FrozenTrial]:
        trials: list[FrozenTrial] = self._answered(self._study.get_trials, deepcopy=False)
        return trials

    def _schedule(self, trial: FrozenTrial) -> Schedule | None:
        try:
            return self.grid.schedules.get(self.grid.key(trial.params))
        except KeyError:
            return None

    def _add(self, schedule: Schedule, state: TrialState, outcome: Outcome | None = None) -> None:
        attributes: dict[str, Any] = {"worker": self.worker}
        value, constraints = None, None
        if outcome is not None:
            attributes |= {"known": True, **_attributes(outcome)}
            slowest = max((o.time_us for o in self.outcomes() if o.time_us is not None), default=1.0)
            value = outcome.time_us if outcome.time_us is not None else 2 * slowest
            constraints = {CONSTRAINT: float(outcome.time_us is None)}
        trial = create_trial(
            state=state,
            value=value,
            params=self.grid.params(schedule),
            distributions=self.grid.distributions,
            user_attrs=attributes,
            constraints=constraints,
        )
        self._answered(self._study.add_trial, trial)

    def _withdraw(self, number: int) -> None:
        with contextlib.suppress(ValueError, RuntimeError):
            self._answered(self._study.tell, number, state=TrialState.FAIL)

    def _beat(self, count: int) -> None:
        self._answered(self._study.set_user_attr, _beat_key(self.worker), count)

    def _count_aloud(self) -> None:
        count = 0
        while not self._stop.wait(BEAT_S):
            count += 1
            with contextlib.suppress(StudyUnreachable):  # the one who works will hear of it
                self._beat(count)

    def _answered(self, ask: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """``ask(*arguments)`` of the storage, more than once where it does not answer.

        Raises:
            StudyUnreachable: it never did.
        """
        for pause in PAUSES_S:
            try:
                return ask(*arguments, **named)
            except _unreachable():
                if not self.shared or self._stop.wait(pause):
                    break
        try:
            return ask(*arguments, **named)
        except _unreachable() as error:
            storage = self.place.storage if self.place else "in memory"
            raise StudyUnreachable(_shown(storage), _cause(error)) from error


@dataclass(slots=True)
class LastAct:
    """``result`` holds the records once somebody has made them; None: they are this worker's to make."""

    result: tuple[Record, ...] = field(default=())

    @property
    def mine(self) -> bool:
        """Whether this worker is to do it."""
        return not self.result


# ---- storages ----


class _Lock:
    """A lock that dies with its holder; Optuna's own stay behind, and are broken after 30 s.

    Whoever takes it cuts off a line that a full disk or a killed writer left unfinished: Optuna would append
    to it, and never read the journal again.
    """

    def __init__(self, path: Path) -> None:
        self._journal, self._path = path, path.with_name(path.name + ".lock")
        self._file: Any = None

    def acquire(self) -> bool:
        file = self._path.open("a")
        fcntl.flock(file, fcntl.LOCK_EX)
        self._file = file
        if self._journal.exists():
            with self._journal.open("r+b") as journal:
                _cut_torn_line(journal)
        return True

    def release(self) -> None:
        self._file.close()


def _cut_torn_line(journal: Any) -> None:
    size = end = journal.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - 4096)
        journal.seek(start)
        at = journal.read(end - start).rfind(b"\n")
        if at >= 0:
            end = start + at + 1
            break
        end = start
    if end < size:
        journal.truncate(end)


def open_storage(text: str) -> BaseStorage:
    """Optuna's storage for a database's URL or a journal file's path.

    Raises:
        InvalidValue, StudyUnreachable, MalformedFile, ToolMissing: as :class:`Ledger`.
    """
    if "://" not in text:
        return _journal(Path(text).expanduser())
    try:
        import sqlalchemy.exc
        from sqlalchemy.engine import make_url

        url = make_url(text)
        dialect = url.get_dialect().name
    except ModuleNotFoundError as error:
        raise ToolMissing(error.name or "the database's driver", "postgres") from error
    except sqlalchemy.exc.ArgumentError as error:
        allowed = "a path, or a URL like postgresql+psycopg://user@host/database, is expected"
        raise InvalidValue("storage", text, allowed) from error
    arguments = {"connect_timeout": ANSWER_S} if dialect in ("postgresql", "mysql") else {}
    options = {"pool_pre_ping": True, "connect_args": arguments}
    for left in reversed(range(MADE_TRIES)):
        try:
            return optuna.storages.RDBStorage(text, engine_kwargs=options)
        except ModuleNotFoundError as error:
            raise ToolMissing(error.name or "the database's driver", "postgres") from error
        except (sqlalchemy.exc.IntegrityError, sqlalchemy.exc.ProgrammingError) as error:
            # Workers that begin together with an empty database all make Optuna's tables; all but one fail.
            if not left:
                raise StudyUnreachable(_shown(text), _cause(error)) from error
            time.sleep(0.5)
        except _unreachable() as error:
            raise StudyUnreachable(_shown(text), _cause(error)) from error
    raise AssertionError("unreachable")


def _journal(path: Path) -> BaseStorage:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Optuna takes a file's only line, whatever it holds, for one that is still being written
        if path.exists() and not _begins_like_one(path):
            raise ValueError("its first line is not an object")
        return JournalStorage(JournalFileBackend(str(path), lock_obj=_Lock(path)))
    except OSError as error:
        raise StudyUnreachable(str(path), error.strerror or str(error)) from error
    except (ValueError, KeyError, TypeError) as error:
        raise MalformedFile(path, "journal", f"not a journal of Optuna's: {error}") from error


def _begins_like_one(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(1) in (b"", b"{")


def _unreachable() -> tuple[type[BaseException], ...]:
    import sqlalchemy.exc

    return (
        optuna.exceptions.StorageInternalError,
        sqlalchemy.exc.OperationalError,
        sqlalchemy.exc.InterfaceError,
        sqlalchemy.exc.InternalError,
        OSError,
    )


def _shown(storage: str) -> str:
    """A storage without its password."""
    if "://" not in storage:
        return storage
    from sqlalchemy.engine import make_url

    return make_url(storage).render_as_string(hide_password=True)


def _cause(error: BaseException) -> str:
    """The first line of what is behind an error: SQLAlchemy's own ends in a link."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(getattr(error, "orig", None) or error).strip()
    return text.splitlines()[0] if text else type(error).__name__


# ---- trials and workers ----


def _known(trial: FrozenTrial) -> bool:
    return bool(trial.user_attrs.get("known"))


def _attributes(outcome: Outcome) -> dict[str, Any]:
    if outcome.time_us is None:
        return {"reason": outcome.reason}
    return {"records": _dump(outcome.records)} if outcome.records else {}


def _dump(records: tuple[Record, ...]) -> str:
    return json.dumps(codec.encode(_Payload(records)), separators=(",", ":"))


def _outcome(schedule: Schedule, trial: FrozenTrial) -> Outcome:
    if "reason" in trial.user_attrs:
        return Outcome(schedule, None, trial.user_attrs["reason"])
    text = trial.user_attrs.get("records")
    records = codec.decode(_Payload, json.loads(text), "records").records if text else ()
    return Outcome(schedule, trial.value, records=records)


def _beat_key(worker: str) -> str:
    return f"beat {worker}"


def _machine() -> str:
    """Where process numbers mean the same: this boot of this machine, this container."""
    parts = [os.uname().nodename]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii"))
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def _process(pid: int) -> str:
    """A process and when it began, so that another one with its number is not taken for it; "" when gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    after_name = text.rpartition(")")[2].split()  # the name may hold spaces
    return "" if after_name[0] in ("Z", "X") else f"{pid}-{after_name[19]}"
