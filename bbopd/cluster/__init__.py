"""A run placed on a Ray cluster: its processes started on the nodes, watched, and started again where they die."""
