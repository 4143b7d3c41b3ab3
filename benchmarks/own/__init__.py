"""Each module measures one part and has `rows(settings) -> list[Row]`."""
