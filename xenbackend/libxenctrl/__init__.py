"""The real Xen, through libxenctrl and its companions."""
