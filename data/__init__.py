"""The datasets: one module per source of tokens. A regular package, so that another installed `data` cannot shadow it."""
