"""The datasets: one module per source of tokens. A regular package, so that no installed `data` can shadow it."""
