"""The daemon at the source: precopy, switchover, and then the pages that are asked for and all others."""
