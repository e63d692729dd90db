"""The stages on the maps of a frozen encoder, computed once: a variant of a loss takes half a minute, so that seeds and pairs are many."""
