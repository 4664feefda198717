import harness  # noqa: F401 - first of all: it sets how threads wait, which torch reads when it is loaded
