"""The loss step before anything runs: its arrays, its peak, the cards that it fits on."""
