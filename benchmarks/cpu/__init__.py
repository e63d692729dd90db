"""The ops on the CPU next to their peers, checked before they are timed."""
