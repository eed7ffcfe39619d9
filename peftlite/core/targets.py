"""Targets: the language that picks sites.

    "q_proj"             a word: whatever is called that
    "layers.0.attn"      a path: what the method takes of everything in that module
    "*.attn.*"           a glob
    "layers.0.q.weight"  an address, taken at its word
    a compiled regex, a predicate of a site, or a list of all these

A pattern that matches nothing is an error that names the nearest addresses.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from torch import nn

from peftlite.core.patch import Method, Targets
from peftlite.core.site import CALL, Site, slice_of, split_index, whole_address
from peftlite.errors import TargetError
from peftlite.quant import others
from peftlite.table import listed, short


def select(
    everything: Sequence[Site], targets: Targets, exclude: Targets, method: Method
) -> list[tuple[Site, bool]]:
    """The sites a method takes, and whether each was asked for by a target.

    Raises TargetError if a pattern matches nothing, or nothing that the method can take.
    """
    left_out = {s.address for p in _patterns(exclude) for s in _excluded(everything, p)}
    if targets is None:
        picked = {s.address: (s, False) for s in everything if _try(s) and method.default(s)}
        if not picked:
            accepted = [s for s in everything if _try(s) and method.accepts(s)]
            hint = f"it takes {method.takes}"
            if accepted:
                hint = _examples(accepted, "name some with targets=, such as", calls=True)
            if quantized := [why for site in everything if (why := _quantized(site))]:
                hint = quantized[0]
            raise TargetError(
                f"{type(method).__name__} takes none of this model's sites by default; {hint}"
            )
        hidden = [s for s in everything if s.linear and _quantized(s) and method.default(s)]
        _check_codes(f"{type(method).__name__} by default", picked, hidden, left_out)
    else:
        patterns = _patterns(targets)
        if not patterns:
            raise TargetError("targets is empty; leave it out for the method's own choice")
        matched = (s for p in patterns for s in _matches(everything, p, method, left_out))
        picked = {s.address: (s, True) for s in matched}
    chosen = [pair for pair in picked.values() if not {*_addresses(pair[0])} & left_out]
    if not chosen:
        raise TargetError(f"exclude={exclude!r} leaves {type(method).__name__} no site to take")
    asked = {site.address: how for site, how in chosen}
    if parts := [a for a in left_out if whole_address(a) != a and whole_address(a) in asked]:
        raise TargetError(
            f"exclude names {parts[0]}, a part of a tensor that is taken whole: name the parts to "
            "take with targets="
        )
    taken = method.choose([site for site, _ in chosen], everything)
    return [(site, asked.get(site.address, targets is not None)) for site in taken]


def _addresses(site: Site) -> tuple[str, str]:
    return site.address, whole_address(site.address)


def _excluded(everything: Sequence[Site], pattern: Any) -> list[Site]:
    try:
        return _matches(everything, pattern, None)
    except TargetError as error:
        raise TargetError(f"in exclude: {error}") from error


def _patterns(targets: Targets) -> list[Any]:
    if targets is None:
        return []
    return list(targets) if isinstance(targets, list | tuple | set | frozenset) else [targets]


def _matches(
    everything: Sequence[Site],
    pattern: Any,
    method: Method | None,
    left_out: Collection[str] = (),
) -> list[Site]:
    """The sites that one pattern names; `method` says which of a module's it takes, None all."""

    def takes(site: Site) -> bool:
        return method is None or (_try(site) and method.accepts(site))

    if not isinstance(pattern, str | re.Pattern):
        found = [site for site in everything if takes(site) and _holds(pattern, site)]
        if not found:
            offered = [site.address for site in everything if takes(site)]
            raise TargetError(
                f"the predicate {short(pattern)} is true for none of the {len(offered)} sites "
                f"offered to it: {listed(offered)}"
            )
        return found
    text, part = (pattern, None) if isinstance(pattern, re.Pattern) else split_index(pattern)
    literal = isinstance(text, str) and "*" not in text
    if text == "":
        raise TargetError("an empty string names nothing; leave targets out for the default")
    is_path = literal and any(text in (*s.names, *_modules_above(s)) for s in everything)
    matches = _matcher(text, is_path)
    found, refused = [], []
    for site in everything:
        by_address = any(map(matches, site.names))
        around = _modules_above(site, every=method is None)
        if not by_address and not any(map(matches, around)):
            continue
        # an address spelled out is taken at its word: the method's `build` may refuse it
        wanted = takes(site) or (by_address and literal)
        (found if wanted else refused).append(site)
    if found and part is not None:
        found = [slice_of(site, part) for site in found if not site.is_call]
    if method is not None and refused and not found:
        reasons = [why for site in refused if (why := _quantized(site))]
        raise TargetError(
            f"{_show(pattern)} matches {listed(s.address for s in refused)}; but "
            + (reasons[0] if reasons else f"{type(method).__name__} takes {method.takes}")
        )
    if not found:
        raise TargetError(f"{_show(pattern)} matches nothing; {_hint(everything, text)}")
    hidden = [s for s in refused if method and s.linear and _quantized(s) and method.accepts(s)]
    _check_codes(_show(pattern), found, hidden, left_out)
    return found


def _check_codes(
    what: str, found: Collection[Any], hidden: Sequence[Site], left_out: Collection[str]
) -> None:
    """Raises TargetError if some of what is meant can't be taken, its weights being codes."""
    lost = [site for site in hidden if site.address not in left_out]
    if lost:
        raise TargetError(
            f"{what} is for {len(lost)} sites more than the {len(found)} that can be taken: "
            f"{_quantized(lost[0])}; or say what to take with targets= and exclude="
        )


def _matcher(text: Any, is_path: bool) -> Callable[[str], bool]:
    """What a pattern says of a path; cached, since sites share their modules.

    Words that are no path of the model (`is_path`) are the end of one.
    """
    if isinstance(text, re.Pattern):
        regex = text
    else:
        start = "" if "*" in text or (is_path and "." in text) else r"(.*\.)?"
        regex = re.compile(start + ".*".join(map(re.escape, text.split("*"))))
    return functools.cache(lambda path: regex.fullmatch(path) is not None)


def _modules_above(site: Site, every: bool = False) -> Iterator[str]:
    """The modules whose naming takes the site: for a call its own, for a tensor all around it."""
    for name in site.names:
        path = name
        if site.is_call:
            path = name.removesuffix(CALL)
            yield path
        while "." in path and (every or not site.is_call):
            path = path.rpartition(".")[0]
            yield path


def _try(site: Site) -> bool:
    """Whether a method may be offered the site unless it's spelled out: floats and calls."""
    return site.is_call or no_numbers(site) is None


def no_numbers(site: Site) -> str | None:
    """Why nothing in a tensor could learn; None if it could."""
    if site.slot == "weight" and others.hidden(site.module):
        why = others.why_not(site.module)
        return why and f"{site.address} {why}"
    w = site.whole
    if type(w).__module__.startswith("bitsandbytes"):  # before it is on its device, too
        return (
            f"{site.address} is of bitsandbytes, a {type(w).__name__}, whose codes its own layers "
            "alone can read: take a base that isn't quantised, or that torchao's quantize_ made"
        )
    if not w.is_floating_point():
        return f"{site.address} holds {w.dtype}: no gradient can flow through it"
    return None


def _quantized(site: Site) -> str | None:
    """Why a weight can't have a delta, if that is for its codes."""
    return None if site.is_call or site.whole.dim() < 2 else no_numbers(site)


def _holds(predicate: Any, site: Site) -> bool:
    """What a predicate says of a site."""
    if isinstance(predicate, type | nn.Module) or not callable(predicate):
        raise TargetError(
            f"{short(predicate)} is no target: give an address such as {site.address!r}, a "
            "compiled regex, a predicate such as lambda site: isinstance(site.module, nn.Linear), "
            "or a list of these"
        )
    try:
        return bool(predicate(site))
    except Exception as error:
        raise TargetError(
            f"the predicate {short(predicate)} failed at {site.address}: {error!r}; it is given a "
            "site, with its .address, .module and .shape"
        ) from error


def nearest(everything: Sequence[Site], address: str) -> str:
    """The addresses of a model that are nearest to one it lacks."""
    return _hint(everything, address)


def _show(pattern: Any) -> str:
    return repr(pattern.pattern if isinstance(pattern, re.Pattern) else pattern)


def _examples(everything: Sequence[Site], introduction: str, calls: bool = False) -> str:
    """Some addresses to type: of calls where those are asked for, of tensors otherwise."""
    found = [repr(s.address) for s in everything if calls or not s.is_call][:3]
    return f"{introduction} {', '.join(found)}" if found else "the model has no parameters"


def _hint(everything: Sequence[Site], text: Any) -> str:
    """The addresses nearest to what was asked, as something to type."""
    if isinstance(text, re.Pattern):
        return _examples(everything, "a regex has to match a whole path, such as")
    if text in ("all-linear", "all_linear"):
        return "leave targets out for the weights of all linear maps but the head's"
    if re.search(r"[\\()|^$+?]", text.removesuffix(CALL)):
        return "for a regex, pass re.compile(...)"
    names = {n for s in everything for n in s.names} | {
        path for s in everything for path in _modules_above(s) if path
    }
    words = {piece.lower(): piece for n in names for piece in (n, n.rpartition(".")[2])}
    near = difflib.get_close_matches(text.strip("*.").lower(), sorted(words), n=4, cutoff=0.5)
    if not near:
        return _examples(everything, "there are such as")
    return f"nearest: {', '.join(repr(words[word]) for word in near)}"
