"""The book: pages.py prepares what conf.py renders, symbols.py and links.py finish and check it."""
