"""Evaluation of pruning quality on RULER, InfiniteBench and NIAH tasks, without downloads."""
