"""The lm-eval tasks that mico ships: YAML files, and the data set that they ask about."""
