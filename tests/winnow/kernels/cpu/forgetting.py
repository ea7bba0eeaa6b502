"""The libraries are looked for once in a process; tests have them looked for again."""

from winnow.kernels.cpu import library


def forget() -> None:
    of_products = (library.library, library.is_usable, library.has_amx)
    for cached in (*of_products, library.portable_library, library.is_portable_usable):
        cached.cache_clear()
