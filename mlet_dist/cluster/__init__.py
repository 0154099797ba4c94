"""Starting ranks: on this node by torch elastic, on several after they have met and agreed that they are one job."""
