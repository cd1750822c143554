"""One solution of each turn and exercise; `answer("name")` in a notebook shows it."""
