"""The pair of domains: street scenes in two layouts and two styles."""
