def all_tables(rows):
    return {}
