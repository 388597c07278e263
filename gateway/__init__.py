"""The front of the cluster: sequences requests, routes them to workers, streams text. No torch."""
