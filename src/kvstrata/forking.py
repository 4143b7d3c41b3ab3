"""What has to be done around a fork, by whoever holds locks, threads or files."""

from __future__ import annotations

import os
import threading
import weakref
from typing import Protocol

__all__ = ["after_fork", "before_fork"]


class _Forkable(Protocol):
    def _forget_parent(self) -> None: ...


class _Preparing(Protocol):
    def _prepare_fork(self) -> None: ...

    def _go_on_after_fork(self) -> None: ...


_forkable: weakref.WeakSet[_Forkable] = weakref.WeakSet()
_preparing: weakref.WeakSet[_Preparing] = weakref.WeakSet()
_prepared = threading.local()


def after_fork(resource: _Forkable) -> None:
    """Have `resource._forget_parent()` called in each forked child, for as long as it exists."""
    _forkable.add(resource)


def before_fork(resource: _Preparing) -> None:
    """Have `resource._prepare_fork()` called before each fork, and `_go_on_after_fork()` after it in the parent."""
    _preparing.add(resource)


def _before() -> None:
    _prepared.resources = []
    for resource in list(_preparing):
        resource._prepare_fork()
        _prepared.resources.append(resource)


def _in_parent() -> None:
    for resource in _prepared.__dict__.pop("resources", []):
        resource._go_on_after_fork()


def _in_child() -> None:
    for resource in list(_forkable):
        resource._forget_parent()


os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)
