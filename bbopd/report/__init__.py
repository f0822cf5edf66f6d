"""What a run came to, for people: one page (`html.write_report`) and one table (`table.result_table`), from the files of its folder."""
