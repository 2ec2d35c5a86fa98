"""Many workers, simulated: what routing and a shared tier do to hits, first tokens and bytes on the network."""
