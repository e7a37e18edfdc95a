from pathfm.tables import text_table


def test_words_stand_to_the_left_and_whole_numbers_to_the_right():
    table = text_table(["cohort", "files", "first"], [["brca", 12, "a.jpg"], ["a_long_name", 12_345, "b.jpg, c.jpg"]])
    assert table == (
        "  cohort        files  first\n"
        "  brca             12  a.jpg\n"
        "  a_long_name  12,345  b.jpg, c.jpg"
    )  # fmt: skip


def test_a_table_without_rows_is_its_header():
    assert text_table(["cohort", "files"], [], indent="") == "cohort  files"
