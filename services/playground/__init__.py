"""The page at `/`, and that of `winnow explain`: what was dropped of a prompt, to look at."""
