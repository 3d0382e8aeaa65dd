"""From a model to coupled groups: trace, rules, groups."""
