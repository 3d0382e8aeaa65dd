"""The bench: what a budget costs in accuracy and in training time, beside what people do without.

    tasks/      data, a network, a loop to train it, a figure       (text, images, scratch, language, graph)
    sides/      what is done about the budget during that loop      (ours, by hand, gates, Torch-Pruning)
    run.py      one task, side, budget and seed -> one row
    tables.py   rows -> tables
    main.py     what is left to do, what it costs, and doing it

Only public names of controlprune are used (and how an extent is read), so that the
same bench runs on an older checkout.
"""
