"""peftlite: parameter-efficient fine-tuning that attaches to any torch module."""

from typing import TYPE_CHECKING

from peftlite.version import __version__ as __version__

if TYPE_CHECKING:
    from peftlite.bank import *  # noqa: F403
    from peftlite.public import *  # noqa: F403
    from peftlite.train import *  # noqa: F403
else:
    # importing peftlite costs nothing: a room is imported when something of its is asked for

    def _rooms():
        """The modules that have the public names; who takes one doesn't import those behind it."""
        import peftlite.public as room

        yield room
        import peftlite.bank as room

        yield room
        import peftlite.train as room

        yield room

    def __getattr__(name: str) -> object:
        if name == "__all__":
            return sorted({name for room in _rooms() for name in room.__all__})
        if not name.startswith("_"):
            for room in _rooms():
                if name in room.__all__:
                    return globals().setdefault(name, getattr(room, name))
        raise AttributeError(_unknown(name))

    def _unknown(name: str) -> str:
        from peftlite.spelling import hint

        start = f"module {__name__!r} has no attribute {name!r}"
        if name.startswith("_"):
            return start
        from peftlite.compat.peft import __all__ as theirs

        also = f", or peftlite.compat.peft.{name}" if name in theirs else ""
        return f"{start}{hint(name, __getattr__('__all__'))}{also}"

    def __dir__() -> list[str]:
        return [*__getattr__("__all__"), "__version__"]
