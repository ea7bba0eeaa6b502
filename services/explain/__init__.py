"""`winnow explain`: a self-contained page that shows what pruning did to one prompt."""
