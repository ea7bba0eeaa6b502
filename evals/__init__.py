"""Quality of pruning: RULER, InfiniteBench and NIAH tasks that need no download, and their run."""
