"""One file per downstream task, each with one value; `catalogue.py` lists them."""
