"""How the objectives are computed: each module states one contract and has a plain, slow twin as its oracle."""
