"""Hostile sweeps by the hundred thousand, through the same door as `--dry-run`.

    PYTHONPATH=. python tests/faults/fuzz_sweep.py --inputs 200000
    PYTHONPATH=. python tests/faults/fuzz_sweep.py --guided 300      (pip install atheris)

An input is a sweep file and some overrides. It is made from a seed (the sweeps of the
project, the examples of its grammar, hand-made traps) by changes to its bytes, its lines and
its tree; the guided mode lets libFuzzer choose by which lines of the project an input
reaches. Each goes through loading, expansion, planning and printing, and must end in status
0 or in status 2 with one printable line, within a second, in bounded memory, and without a
file written outside the output folder, a process started or a socket opened. The audit hook
that watches this sees what Python does, whichever library asked for it.

What went wrong is written to a folder, one file per kind of failure; a file is run again with
`--replay FILE…`.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import itertools
import json
import os
import random
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 1.0
"""CPU time of one input."""
INSTRUMENTED = 3
"""Times as long as code may take that libFuzzer watches line by line: the slowest input found so
took 1.5 s watched and 0.43 s not."""
HANG_S = 10.0
"""CPU time after which an input is cut off, so that the others can run."""
STUCK_S = 120.0
"""Wall time after which it is, seconds: on a busy machine an input may wait for its turn."""
MEMORY_BYTES = 4 * 2**30
"""Address space of the process: what asks for more gets a MemoryError, which is a failure."""
MOST_POINTS = 200
"""A larger grid takes as long as it is asked to; here the parser refuses it."""
SPLIT = b"\n\xff\n"
"""Between the file and each override; no UTF-8 text holds it."""
PROFILES = ("cpu", "h100")

TRAPS = [
    "",
    "name: a\n",
    "name: a\nbase: {model.name: mixtral-8x7b, model.weights: dummy}\n",
    "name: a\nbase: {model.name: ~nobody/x}\n",
    "name: a\nbase:\n  model: {name: olmoe-1b-7b, weights: dummy, num_layers: 99999999999}\n",
    "name: ../../a\nbase: {model.name: /etc}\n",
    'name: "a\\0b"\nbase: {model.name: "\\e[31mred\\e[0m"}\n',
    "name: a\nbase: &b {model: {name: mixtral-8x7b}}\ngrid: {<<: *b}\n",
    "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nd: &d [*c, *c]\ne: [*d, *d]\n",
    'name: a\nbase: !!python/object/apply:os.system ["touch /tmp/x"]\n',
    "name: a\nbase: {model.name: m, engine.args: {x: ${oc.env:HOME}}}\n",
    "name: a\nbase: {model.name: mixtral-8x7b}\nwhere: [\"__import__('os').system('x')\"]\n",
    "name: a\nbase: {model.name: mixtral-8x7b}\nwhere: ['9**9**9**9 > 1', '(((((1)))))']\n",
    "name: a\nbase: {model.name: mixtral-8x7b}\ngrid: {model.top_k: [1, 2]}\n"
    "zip: {workload.batch_size: [1, 2], workload.input_tokens: [8, 16]}\n"
    "cases: [{}, {model.prune: {kind: inter, ratio: 0.5}}]\n"
    "where: [model.top_k <= model.num_experts, 1 < layout.devices <= 8]\n"
    "profiles: {cpu: {grid: {model.top_k: null}}, h100: {}}\n"
    + SPLIT.decode("latin-1")
    + "base.workload.batch_size=4"
    + SPLIT.decode("latin-1")
    + "where[0]=model.top_k < 3",
]

SCALARS: list[Any] = [
    *(None, True, False, 0, 1, 2, 3, 7, 8, 64, -1, 2**31, 2**63 - 1, -(2**63), 2**63, 10**30),
    *(0.5, 1.0, 1e-300, 5e-324, 1e308, -0.0, float("inf"), float("nan")),
    *("", "m", "mixtral-8x7b", "deepseek-v2-lite", "olmoe-1b-7b", "fp8", "dummy", "inter", "ngram"),
    *("true", "null", "010", "1e5", "2", "no", "~", "~nobody", "~/x", "../..", "/etc", "/dev/zero"),
    *("a/b", "a\x00b", "\x1b[31mred\x1b[0m", "\x1b]0;title\x07", "a\nb", "\r\n", "\u202egnp.exe"),
    *(
        "[bold]x[/bold]",
        "[/]",
        "[link=http://x]",
        "${name}",
        "${base.model.name}",
        "${oc.env:HOME}",
    ),
    *(
        "${base.engine}",
        "${",
        "???",
        "\\???",
        "\\${name}",
        "\ufeff",
        "\u2028",
        "\ud7ff",
        "𝕄",
        "x" * 300,
    ),
    *(
        "y" * 9_999,
        "model.top_k < 3",
        "not 1",
        "min(1, 2) < 3",
        "1 / 0 > 1",
        "'a' < 1",
        "b" * 250 + "/c",
    ),
    *({}, [], [[]], [{}], {"": 1}, {"a": {"b": [1, {"c": None}]}}, {"kind": "inter", "ratio": 0.5}),
    *({"model": "ngram", "tokens": 4}, {"<<": {}}, [1, 2, 3], [None, 1], ["a", 1, None]),
]
KEYS = ["name", "base", "grid", "zip", "cases", "where", "profiles", "cpu", "h100", "<<", "", "."]
TOKENS = """
< <= == != in not and or is if else lambda ( ) [ ] { } , + - * ** / // % : := . ' " null None true
1 2.5 1e400 0x1f 9223372036854775807 min( max( abs( model.top_k model.num_experts model.name
model.prune.ratio layout.devices measure.most_repeats engine.args.x model.hidden_size x.__class__
""".split()
BYTES = [
    *(b"\x00", b"\xff", b"\xef\xbb\xbf", b"\n", b"\t", b"  ", b"- ", b": ", b"? ", b"&a ", b"*a "),
    *(
        b"!!x ",
        b"!<x> ",
        b"<<: *a",
        b"---\n",
        b"...\n",
        b"%YAML 1.1\n",
        b"|\n",
        b">-\n",
        b"#",
        b"'",
    ),
    *(b'"', b"[", b"]", b"{", b"}", b",", b"\x1b[2J", b"\xe2\x80\xae", b"\\", b"${", b"}", b"= "),
    *(b"9" * 25, b"[" * 60, b"{a: " * 40, b"\xc3\x28", b"\xf0\x9f\x92\xa3", SPLIT),
]


_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class Failure(AssertionError):
    """An input broke a promise. The first words say which, the same for all of its kind."""


# --- the audit hook


@dataclass
class _Watch:
    """What the audit hook compares with. One for the process: a hook cannot be removed."""

    folder: str = ""
    """Only here may files be written; empty while nothing is watched."""
    broken: list[str] = field(default_factory=list)


_watch = _Watch()
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = re.compile(
    r"os\.(mkdir|rmdir|remove|rename|link|symlink|truncate|chmod|chown|utime|setxattr|mkfifo)"
)
_FORBIDDEN = re.compile(
    r"os\.(system|exec|fork|forkpty|posix_spawn|spawn|kill|putenv|unsetenv)|subprocess\."
    r"|socket\.(connect|bind|getaddrinfo|sendto)|urllib\.|http\.|ftplib\.|pty\.|webbrowser\."
    r"|ctypes\.dlopen|shutil\.(rmtree|move|copy)|pickle\.find_class|marshal\.loads"
)
_ours = ("os.", "open", "subprocess.", "socket.", "shutil.", "pickle.", "ctypes.", "marshal.")


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watch.folder or not event.startswith(_ours):
        return
    if event == "open":
        path, mode, flags = arguments
        if isinstance(path, int) or not (flags & _WRITES or set(mode or "") & set("wax+")):
            return
        _inside(event, path)
    elif _CHANGES.match(event):
        for path in arguments:
            if isinstance(path, str | bytes | os.PathLike):
                _inside(event, path)
    elif _FORBIDDEN.match(event) and event != "marshal.loads":
        _watch.broken.append(f"{event} {arguments!r}"[:300])


def _inside(event: str, path: Any) -> None:
    real = os.path.realpath(os.fsdecode(path))
    if real != _watch.folder and not real.startswith(_watch.folder + os.sep):
        _watch.broken.append(f"{event} {real}"[:300])


# --- one input


class Target:
    """Runs inputs; everything that they may write lies in one folder."""

    def __init__(self, folder: Path, patience_s: float = PATIENCE_S) -> None:
        from orchestrator import request, sweep
        from orchestrator.store import Dataset

        self._patience_s = patience_s
        self._folder = folder.resolve()
        self._file = self._folder / "input.yaml"
        self._out = self._folder / "out"
        self._names: set[str] = set()
        self._dataset: Any = Dataset
        self._sweep: Any = sweep
        self.slowest = 0.0
        self.statuses: Counter[int] = Counter()
        self.messages: Counter[str] = Counter()
        request.own_class()  # opens the driver's library, once
        self.run(TRAPS[2].encode(), check=False)  # whatever is imported late is imported now

    def run(self, data: bytes, *, check: bool = True) -> int:
        """The exit status of one input.

        Raises:
            Failure: it broke a promise.
        """
        text, *overrides = data.split(SPLIT)
        self._file.write_bytes(text)
        arguments = tuple(os.fsdecode(one.replace(b"\0", b"")) for one in overrides)
        as_json = sum(data[-8:]) % 2 == 0
        profile = PROFILES[sum(data[-9:]) // 2 % 2]
        out, err = io.StringIO(), io.StringIO()
        _watch.folder, _watch.broken = str(self._folder), []
        start = time.process_time()
        try:
            with _cut_off(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                status = self._dry_run(arguments, profile, as_json)
        except Failure:
            raise
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            at = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{type(error).__name__} in {at.name}, {Path(at.filename).name}"
            raise Failure(f"traceback: {where}: {error}"[:400]) from error
        finally:
            took = time.process_time() - start
            _watch.folder, broken = "", _watch.broken
            self.slowest = max(self.slowest, took) if check else self.slowest
        if not check:
            return status
        self.statuses[status] += 1
        if broken:
            raise Failure(f"outside the folder: {broken[0]}")
        if took > self._patience_s:
            raise Failure(f"slow: {took:.1f} s")
        self._look_at(status, out.getvalue(), err.getvalue(), as_json)
        return status

    def _dry_run(self, arguments: tuple[str, ...], profile: str, as_json: bool) -> int:
        from orchestrator.__main__ import _explained
        from orchestrator.request import Request

        request = Request(
            sweep=self._file,
            overrides=arguments,
            out=self._out,
            profile=profile,
            json=as_json,
        )
        before, self._sweep.MAX_POINTS = self._sweep.MAX_POINTS, MOST_POINTS
        try:
            status = _explained(request, dry_run=True)
            if status == 0:
                self._open(sys.stdout.getvalue())  # type: ignore[attr-defined]
        finally:
            self._sweep.MAX_POINTS = before
        return status

    def _open(self, plan: str) -> None:
        """Makes the dataset of a sweep, as its first run would."""
        if plan.startswith("{"):
            name = json.loads(plan)["sweep"]
        elif told := re.search(r"^sweep ([^,]*), profile", plan, re.MULTILINE):
            name = told[1]
        else:
            raise Failure("a plan without the sweep's name")
        if name not in self._names:
            self._names.add(name)
            self._dataset.open(self._out, name).close()

    def _look_at(self, status: int, out: str, err: str, as_json: bool) -> None:
        if status == 2:
            line = err.removesuffix("\n")
            if out or not line.startswith("error: ") or not line.isprintable():
                raise Failure(f"message: {line!r}"[:400])
            self.messages[re.sub(r"\d+|'[^']*'|input.yaml:\S* \S*", "_", line)[-60:]] += 1
        elif status == 0:
            if err:
                raise Failure(f"noise: {err!r}"[:400])
            if as_json:
                json.loads(out, parse_constant=_no_constant)
            elif not out.replace("\n", "").isprintable():
                raise Failure(f"control characters in the plan: {out!r}"[:2000])
        else:
            raise Failure(f"status {status}")


def _no_constant(word: str) -> None:
    raise Failure(f"{word} in the plan's JSON")


@contextlib.contextmanager
def _cut_off() -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise Failure(f"hang in {frame.f_code.co_name if frame else '?'}")

    timers = (
        (signal.SIGPROF, signal.ITIMER_PROF, HANG_S),
        (signal.SIGALRM, signal.ITIMER_REAL, STUCK_S),
    )
    handlers = [signal.signal(number, stop) for number, _, _ in timers]
    before = [signal.setitimer(timer, seconds) for _, timer, seconds in timers]
    try:
        yield
    finally:
        for (number, timer, _), handler, old in zip(timers, handlers, before, strict=True):
            signal.setitimer(timer, *old)
            signal.signal(number, handler)


# --- making inputs


def seeds() -> list[bytes]:
    """The project's sweeps, the examples of the grammar, and traps."""
    files = [path.read_bytes() for path in sorted((ROOT / "sweeps").glob("*.yaml"))]
    grammar = (ROOT / "sweeps" / "README.md").read_text()
    examples = re.findall(r"^```yaml\n(.*?)^```", grammar, re.DOTALL | re.MULTILINE)
    traps = [one.encode("latin-1") if "\xff" in one else one.encode() for one in TRAPS]
    return [*files, *(one.encode() for one in examples), *traps]


class Mutator:
    """Changes inputs, in ways that keep many of them close to a right one."""

    def __init__(self, rng: random.Random, others: list[bytes]) -> None:
        from orchestrator import fields

        self._rng, self._others = rng, others
        self._fields = list(fields.catalogue().values())
        self._ways: list[tuple[Callable[[bytes], bytes], int]] = [
            (self._bytes, 3),
            (self._lines, 2),
            (self._tree, 12),
            (self._override, 8),
        ]

    def __call__(self, data: bytes, most: int = 1 << 16) -> bytes:
        ways, weights = zip(*self._ways, strict=True)
        for _ in range(self._rng.choice((1, 1, 1, 2, 2, 4))):
            (way,) = self._rng.choices(ways, weights)
            data = way(data)
        return data[:most]

    def _bytes(self, data: bytes) -> bytes:
        rng = self._rng
        at = rng.randint(0, len(data))
        end = min(len(data), at + rng.choice((0, 0, 1, 1, 4, 30, 300)))
        kind = rng.randrange(4)
        if kind == 0:
            new = rng.choice(BYTES)
        elif kind == 1:
            new = bytes(rng.randrange(256) for _ in range(rng.randint(1, 4)))
        elif kind == 2:
            new = data[at:end] * rng.choice((0, 2, 3, 40))
        else:
            other = rng.choice(self._others)
            start = rng.randint(0, len(other))
            new = other[start : start + rng.randint(1, 200)]
        return data[:at] + new + data[end:]

    def _lines(self, data: bytes) -> bytes:
        rng = self._rng
        lines = data.split(b"\n")
        at, to = rng.randrange(len(lines)), rng.randrange(len(lines))
        kind = rng.randrange(5)
        if kind == 0:
            del lines[at]
        elif kind == 1:
            lines.insert(to, lines[at])
        elif kind == 2:
            lines[at], lines[to] = lines[to], lines[at]
        elif kind == 3:
            lines[at] = rng.choice((b"  ", b"- ", b" ")) + lines[at]
        else:
            lines.insert(at, rng.choice(rng.choice(self._others).split(b"\n")))
        return b"\n".join(lines)

    def _tree(self, data: bytes) -> bytes:
        rng = self._rng
        text, *overrides = data.split(SPLIT)
        try:
            tree = yaml.load(text, Loader=_LOADER)  # noqa: S506  a safe one, in C if it can be
            # Aliases of a hostile seed stand for a billion values.
            list(itertools.islice(_spots(tree), 2_000))
        except Exception:  # noqa: BLE001  not a tree any more: the bytes are changed elsewhere
            tree = None
        if not isinstance(tree, dict):
            tree = {"name": "a", "base": {"model.name": "mixtral-8x7b"}}
        if rng.random() < 0.8:
            self._put(tree)
        else:
            self._change(tree)
        try:
            if rng.random() < 0.5:
                text = json.dumps(tree, ensure_ascii=rng.random() < 0.5).encode()
            else:
                text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True).encode()
        except Exception:  # noqa: BLE001  cannot be written down: left as it was
            return data
        return SPLIT.join([text, *overrides])

    def _put(self, tree: dict[Any, Any]) -> None:
        """Sets a field of a trial, an axis, a case, a constraint, a profile."""
        rng = self._rng
        section = rng.choice(("base", "base", "grid", "grid", "zip", "cases", "where", "profiles"))
        one = rng.choice(self._fields)
        if section == "where":
            new: Any = [self._expression() for _ in range(rng.randint(1, 3))]
            tree[section] = new
        elif section == "profiles":
            patch: dict[Any, Any] = {}
            self._put(patch)
            tree[section] = {rng.choice(PROFILES): patch}
        elif section == "cases":
            cases = tree.get(section)
            cases = cases if isinstance(cases, list) else []
            tree[section] = [*cases[:5], {one.key: self._value(one)}]
        else:
            block = tree.get(section)
            block = block if isinstance(block, dict) else {}
            value = self._value(one)
            if section != "base":
                value = [value, *(self._value(one) for _ in range(rng.randint(0, 3)))]
            tree[section] = {**block, one.key: value}

    def _change(self, tree: Any) -> None:
        rng = self._rng
        spots = list(itertools.islice(_spots(tree), 2_000))
        if not spots:
            return
        holder, key = rng.choice(spots)
        kind = rng.randrange(6)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            known = [*KEYS, *(one.key for one in self._fields), *(one.name for one in self._fields)]
            holder[rng.choice(known)] = holder.pop(key)
        elif kind == 2:
            holder[key] = [holder[key]] * rng.choice((1, 2, 3))
        elif kind == 3:
            holder[key] = {rng.choice(KEYS): holder[key]}
        elif kind == 4:
            other, at = rng.choice(spots)
            # By way of text: a tree must not hold itself.
            holder[key] = json.loads(json.dumps(other[at], default=str))
        else:
            holder[key] = rng.choice(SCALARS)

    def _override(self, data: bytes) -> bytes:
        rng = self._rng
        one = rng.choice(self._fields)
        section = rng.choice(
            ("base", "base", "grid", "zip", "cases[0]", "where[0]", "cases.0", "q")
        )
        key = section if section.startswith("where") else f"{section}.{one.key}"
        if rng.random() < 0.2:
            key = rng.choice((*KEYS, "where", "cases", "base.model", "grid.engine.args.x"))
        if key.startswith("where"):
            value: Any = self._expression()
        else:
            value = self._value(one)
            if section in ("grid", "zip"):
                value = [value, self._value(one)]
        text = json.dumps(value, ensure_ascii=False)
        if rng.random() < 0.2:
            text = str(rng.choice(SCALARS))
        whole = rng.choice((f"{key}={text}",) * 6 + (key, f"{key}==", f"={text}", text))
        return data + SPLIT + whole.encode("utf-8", "surrogatepass")

    def _value(self, one: Any) -> Any:
        """Mostly what the field takes."""
        rng = self._rng
        if rng.random() < 0.1:
            return rng.choice(SCALARS)
        if one.optional and rng.random() < 0.2:
            return None
        if one.choices:
            return rng.choice(one.choices)
        small = {"int": rng.choice((1, 2, 3, 4, 8, 16, 64, 1000, 4096)), "bool": rng.random() < 0.5}
        usual: dict[str, Any] = {
            **small,
            "float": rng.choice((0.001, 0.125, 0.25, 0.5, 1, 2.5, 80)),
            "str": rng.choice(("mixtral-8x7b", "olmoe-1b-7b", "fp8", "ngram", "h100", "a/b")),
            "texts": rng.choice(([], ["a"], ["a", "b"])),
            "block": rng.choice(({}, {"kind": "intra", "ratio": 0.5}, {"model": "ngram"})),
            "free": rng.choice(
                ({}, {"x": 1}, {"x": {"y": [None, "z"]}}, {"kv_cache_dtype": "fp8"})
            ),
        }
        return usual[one.kind]

    def _expression(self, depth: int = 0) -> str:
        rng = self._rng
        if rng.random() < (0.02 if depth else 0.1):
            return " ".join(rng.choices(TOKENS, k=rng.randint(1, 12)))
        if depth > 4 or rng.random() < 0.3:
            names = [one.key for one in self._fields] + ["layout.devices", "model.hidden_size"]
            return rng.choice(
                (*rng.choices(names, k=4), "1", "2.5", "0", '"fp8"', "null", "[1, 2]")
            )
        a, b = self._expression(depth + 1), self._expression(depth + 1)
        operator = rng.choice(
            ("<", "<=", "==", "!=", "in", "and", "or", "+", "-", "*", "/", "//", "%")
        )
        forms = (
            f"({a}) {operator} {b}",
            f"{a} {operator} ({b})",
            f"not ({a})",
            f"-({a})",
            f"min({a}, {b})",
            f"abs({a})",
            f"{a} {operator} {b} < {a}",
        )
        return rng.choice(forms)


def _spots(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in a tree, as holder and key."""
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
        yield tree, key
        if isinstance(tree[key], dict | list):
            yield from _spots(tree[key])


def inputs(seed: int) -> Iterator[bytes]:
    """An endless stream: the seeds, then changed ones. Some that were changed are changed on."""
    rng = random.Random(seed)
    pool = seeds()
    yield from pool
    fixed, right = len(pool), pool[: -len(TRAPS)]
    mutate = Mutator(rng, pool)
    while True:
        data = mutate(rng.choice(right if rng.random() < 0.6 else pool))
        yield data
        if rng.random() < 0.02 and len(data) < 20_000:
            if len(pool) < 4 * fixed:
                pool.append(data)
            else:
                pool[rng.randrange(fixed, len(pool))] = data


# --- running many


def by_chance(target: Target, number: int, seed: int, failures: Path) -> int:
    """Runs `number` inputs and says what came of them; returns how many failed."""
    kinds: Counter[str] = Counter()
    began = time.monotonic()
    for count, data in enumerate(itertools.islice(inputs(seed), number), 1):
        try:
            target.run(data)
        except Failure as failure:
            kind = re.sub(r"[\d.]+|/\S+", "_", str(failure))[:100]
            kinds[kind] += 1
            if kinds[kind] == 1:
                print(f"FAILED {failure}", flush=True)
                failures.mkdir(parents=True, exist_ok=True)
                (failures / f"{seed}-{len(kinds)}.input").write_bytes(data)
        if count % 1_000 == 0:
            # A plan freezes what it leaves, garbage too: right for a process that makes one.
            gc.unfreeze()
            gc.collect()
        if count % 10_000 == 0 or count == number:
            print(
                f"{count:>8,} inputs  {time.monotonic() - began:5.0f} s  "
                f"{target.statuses[0]:,} plans, {target.statuses[2]:,} refused "
                f"({len(target.messages):,} different messages), {sum(kinds.values())} failed; "
                f"slowest {target.slowest:.2f} s CPU, memory at most {_peak_mib():.0f} MiB",
                flush=True,
            )
    return sum(kinds.values())


def guided(seconds: int, seed: int, corpus: Path, failures: Path, folder: Path) -> None:
    """libFuzzer chooses; ends with the process, which is how libFuzzer ends."""
    import atheris

    with atheris.instrument_imports(include=["orchestrator", "workers"]):
        import orchestrator.__main__
        import orchestrator.plan
        import orchestrator.request  # noqa: F401
    target = Target(folder, INSTRUMENTED * PATIENCE_S)
    corpus.mkdir(parents=True, exist_ok=True)
    failures.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(seeds()):
        (corpus / f"seed-{number}").write_bytes(data)
    rng = random.Random(seed)
    mutate = Mutator(rng, seeds())

    def change(data: bytes, most: int, number: int) -> bytes:
        rng.seed(number)
        changed: bytes
        if number % 2:
            changed = mutate(data, most)
        else:
            changed = atheris.Mutate(data, min(most, len(data) + 64))
        return changed

    atheris.Setup(
        [
            sys.argv[0],
            f"-max_total_time={seconds}",
            f"-seed={seed}",
            "-max_len=20000",
            "-timeout=60",
            "-rss_limit_mb=3000",
            "-print_final_stats=1",
            f"-artifact_prefix={failures}{os.sep}",
            str(corpus),
        ],
        target.run,
        custom_mutator=change,
    )
    atheris.Fuzz()


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def watch() -> None:
    """Sets the audit hook; a process needs it once."""
    sys.addaudithook(_hook)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--inputs", type=int, default=200_000, metavar="N")
    parser.add_argument("--guided", type=int, metavar="SECONDS")
    parser.add_argument("--replay", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--corpus", type=Path, metavar="FOLDER")
    parser.add_argument("--failures", type=Path, metavar="FOLDER")
    asked = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    sys.dont_write_bytecode = True
    watch()
    with tempfile.TemporaryDirectory(prefix="moe-fuzz-") as name:
        folder = Path(name)
        failures = asked.failures or Path(tempfile.gettempdir()) / "moe-fuzz-failures"
        if asked.guided:
            guided(asked.guided, asked.seed, asked.corpus or folder / "corpus", failures, folder)
        target = Target(folder)
        if asked.replay:
            for path in asked.replay:
                print(path, "status", target.run(path.read_bytes()))
            return 0
        return 1 if by_chance(target, asked.inputs, asked.seed, failures) else 0


if __name__ == "__main__":
    sys.exit(main())
