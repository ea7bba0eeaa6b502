"""The library is looked for once in a process; tests have it looked for again."""

from winnow.kernels.cpu import library


def forget() -> None:
    for cached in (library.library, library.is_usable, library.has_amx):
        cached.cache_clear()
