"""The datasets, one module per source of tokens. With this file no installed `data` can shadow it."""
