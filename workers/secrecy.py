"""What must not be written down: keys, tokens, passwords.

A dataset is made to be published, with its manifest and its logs. Secrets reach a run in
three ways: in environment variables, in the sweep (`engine.args.api_key`, on the command
line too), and from there in the words of others, since engines print their arguments and
errors quote addresses. So there are three ways to find one: by the key it stands under, by
how it looks (`hf_…`, `Bearer …`, `https://user:password@host`), and by its value, once it is
known from one of the first two. Whatever is found is written as `***`.

Nothing here is proof against a secret that looks like any word and stands under a key like
any other. Secrets belong into environment variables with a plain name: `HF_TOKEN`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

HIDDEN = "***"
LEAST = 8
"""Characters of a value that is looked for in texts; a shorter one may be any word."""
TOKEN_FILE = "HF_TOKEN_PATH"
"""Variable of the hub's library: the file with its token."""
STAMP = ".scrubbed"
"""File in a folder of logs: what is older has been scrubbed."""

_ALWAYS = frozenset("authorization bearer cookie credential credentials secrets passwords".split())
_ALWAYS_ENDS = ("password", "passwd", "passphrase", "secret", "apikey")
_OFTEN = frozenset({"key", "keys", "token", "tokens"})
_LAST = frozenset({"auth", "key", "token"})
_WORDS = re.compile(r"[A-Z]?[a-z0-9]+|[A-Z]+(?![a-z])")
_NUMBER = re.compile(r"\s*(-?\d+(\.\d+)?|true|false|null)?\s*", re.IGNORECASE)
_KEY = re.compile(r"""(?<![\w.-])([\w.-]{1,200})(["']?)\s{0,9}([:=])\s{0,9}""")
_QUOTED = r"""[bru]?(?:"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')"""
_VALUE = {
    ":": re.compile(rf"{_QUOTED}|[^,}}\]&\n]*"),
    "=": re.compile(rf"{_QUOTED}|[^,}}\]&\s]*"),
}
_USER = re.compile(r"(?<=://)[^/@\s\"']+(?=@)")
_CUT = r"(?:\.\.\.|…|\xe2\x80\xa6)"
"""What stands where a long text was cut; the last one is the second, byte by byte."""
_LOOKS_SECRET = re.compile(
    r"\b(?:hf_|sk-|gh[pousr]_|github_pat_|glpat-|xox[abeprs]-)[\w-]{16,}"
    r"|\bA(?:KIA|SIA)[0-9A-Z]{16}\b|\bAIza[\w-]{30,}"
    r"|\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*"  # a signed web token
    r"|(?<=\bBearer )[\w.~+/=-]+|(?<=\bBasic )[\w+/=]{8,}"
    rf"|(?<=://)[^/@\s\"']+(?=@|{_CUT})|{_CUT}[^/@\s\"']+(?=@)"
)


def hide(value: Any, key: str = "", known: Collection[str] = ()) -> Any:
    """`value` as plain data without secrets.

    Args:
        key: what it stands under; dots part it from what that stands under.
        known: secrets that are known by their value; see `known_secrets`.
    """
    if is_secret(key, value):
        return HIDDEN
    if isinstance(value, Mapping):
        return {
            hide_text(str(name), known): hide(inner, str(name), known)
            for name, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [hide(item, known=known) for item in value]
    return hide_text(value, known) if isinstance(value, str) else value


def hide_text(text: str, known: Collection[str] = ()) -> str:
    """A text without secrets: `{api_key: …}`, well-known tokens, what is `known`."""
    text = _pattern(tuple(known)).sub(HIDDEN, text)
    shown, at = "", 0
    for match in _KEY.finditer(text):
        if match.start() < at or not _names_a_secret(match):
            continue
        value = _VALUE[match[3]].match(text, match.end())
        if value is not None and value[0]:
            shown += text[at : match.end()] + HIDDEN
            at = value.end()
    return shown + text[at:]


def hide_json(text: str, known: Collection[str] = ()) -> str:
    """JSON text without secrets, its keys sorted."""
    return json.dumps(hide(json.loads(text), known=known), sort_keys=True)


def hide_arguments(arguments: Sequence[str], known: Collection[str] = ()) -> list[str]:
    """A command line with `key=secret`, `--key=secret` and `--key secret` hidden."""
    shown: list[str] = []
    secret_follows = False
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if secret_follows and not argument.startswith("--"):
            shown.append(HIDDEN)
        elif equals:
            hidden = HIDDEN if is_secret(key, value) else hide_text(value, known)
            shown.append(f"{hide_text(key, known)}={hidden}")
        else:
            shown.append(hide_text(argument, known))
        secret_follows = not equals and argument.startswith("--") and is_secret(key, "")
    return shown


def known_secrets(*settings: Any, environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Values that stand under the key of a secret, in the environment or in `settings`, and the
    hub's token where the environment names a file with it.

    The longest first: one may begin like another.
    """
    found = set(_secrets(dict(environment), ""))
    with contextlib.suppress(OSError, ValueError):
        token = Path(environment.get(TOKEN_FILE, "")).read_text(encoding="utf-8").strip()
        found.update(_secrets(token, "token"))
    for one in settings:
        found.update(_secrets(one, ""))
    spelt = {
        spelling
        for secret in found
        for spelling in (secret, quote(secret, safe=""), json.dumps(secret)[1:-1])
    }
    return tuple(sorted(spelt, key=len, reverse=True))


def is_secret(key: str, value: Any) -> bool:
    """Whether a value under `key` must not be shown.

    `api_key`, `token` and `password` always; in `input_tokens`, `num_key_value_heads` or
    `eos_token_id` a number (or a list of them) is no secret.
    """
    segments = _segments(key)
    if any(_surely(words) for words in segments):
        return True
    if not any(_OFTEN.intersection(words) for words in segments):
        return False
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return not all(map(_NUMBER.fullmatch, text.strip("[] ").split(",")))


def scrub(folder: Path, known: Collection[str]) -> list[Path]:
    """Overwrites secrets in the log files of a folder, in place.

    A file keeps its length, so a process that goes on writing to it is not disturbed. Files
    that have not changed since the last time are passed over; those that a killed run left
    are not.

    Returns:
        Files that could not be looked at or written to.
    """
    stamp = folder / STAMP
    began = time.time()
    since = stamp.stat().st_mtime if stamp.exists() else 0.0
    if since > began:  # the clock was set back: times of files say nothing
        since = 0.0
    if not folder.is_dir():
        return []
    left = []
    for path in sorted(folder.rglob("*.log")):
        try:
            if path.is_file() and not path.is_symlink() and path.stat().st_mtime >= since:
                _overwrite(path, known)
        except OSError:
            left.append(path)
    if not left:
        with contextlib.suppress(OSError):  # without it they are looked at again
            stamp.touch()
            os.utime(stamp, (began, began))
    return left


def _segments(key: str) -> list[list[str]]:
    return [[word.lower() for word in _WORDS.findall(part)] for part in key.split(".")]


def _surely(words: list[str]) -> bool:
    return bool(
        _ALWAYS.intersection(words)
        or _LAST.intersection(words[-1:])
        or any(word.endswith(_ALWAYS_ENDS) for word in words)
    )


def _names_a_secret(match: re.Match[str]) -> bool:
    """Whether a key within a text is a secret's. In `unexpected token: ]` it is a word."""
    segments = _segments(match[1])
    if not any(_surely(words) for words in segments):
        return False
    before = match.string[max(0, match.start() - 9) : match.start()].rstrip()[-1:]
    prose = match[3] == ":" and not match[2] and before not in ("{", ",")
    return not (prose and len(segments) == 1 and segments[0] in (["key"], ["token"], ["auth"]))


@lru_cache(maxsize=64)
def _pattern(known: tuple[str, ...]) -> re.Pattern[str]:
    """What looks like a secret or is a known one, whole or cut in its middle."""
    found = []
    for secret in known:
        found.append(re.escape(secret))
        if len(secret) >= 2 * LEAST:
            start, end = re.escape(secret[:LEAST]), re.escape(secret[-LEAST:])
            between = r"[^\n'\"]{0,200}?"
            found.append(f"{start}{between}{_CUT}(?:{between}{end})?")
            found.append(f"{_CUT}{between}{end}")
    return re.compile("|".join([*found, _LOOKS_SECRET.pattern]))


def _overwrite(path: Path, known: Collection[str]) -> None:
    with path.open("r+b") as file:
        text = file.read().decode("latin-1")  # one character for each byte
        spelt = tuple(one.encode().decode("latin-1") for one in known)
        for match in _pattern(spelt).finditer(text):
            file.seek(match.start())
            file.write(b"*" * (match.end() - match.start()))


def _secrets(value: Any, key: str) -> Iterator[str]:
    """Texts under secret keys and in addresses, at any depth, that are long enough to be
    looked for."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _secrets(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _secrets(item, key)
    elif isinstance(value, str):
        found = [value.strip()] if is_secret(key, value) else []
        for user in _USER.findall(value):
            found += [user, user.partition(":")[2]]
        yield from (one for one in found if len(one) >= LEAST)
