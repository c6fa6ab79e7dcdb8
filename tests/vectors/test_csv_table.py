"""CSV files of user vectors as pandas, spreadsheets and others write them: each user's own vector, or a refusal."""

from pathlib import Path

import numpy as np
import pytest

from e2p_jax.datasets.prepared import load_table
from e2p_jax.errors import UserError

READ = {  # content -> ids; all have the vectors below
    "header": "user_id,0,1,2\nann,0.5,1.5,-2\nbob,3,4,5e-3\n",
    "numbers as ids": "user_id,0,1,2\n0,0.5,1.5,-2\n1,3,4,5e-3\n",
    "any name": "who,a,b,c\nann,0.5,1.5,-2\nbob,3,4,5e-3\n",
    "any name, counted": "who,0,1,2\nann,0.5,1.5,-2\nbob,3,4,5e-3\n",
    "last": "dim_0,dim_1,dim_2,User_ID\n0.5,1.5,-2,ann\n3,4,5e-3,bob\n",
    "in the middle": "0,id,1,2\n0.5,ann,1.5,-2\n3,bob,4,5e-3\n",
    "pandas, ids as a column": ",user_id,0,1,2\n0,ann,0.5,1.5,-2\n1,bob,3,4,5e-3\n",
    "pandas, some rows of a frame": "Unnamed: 0,user_id,0,1,2\n7,ann,0.5,1.5,-2\n90,bob,3,4,5e-3\n",
    "pandas, twice": "Unnamed: 0.1,Unnamed: 0,user_id,0,1,2\n0,0,ann,0.5,1.5,-2\n1,1,bob,3,4,5e-3\n",
    "pandas, reset_index": "index,0,1,2,user\n0,0.5,1.5,-2,ann\n1,3,4,5e-3,bob\n",
    "pandas, ids as the index": ",0,1,2\nann,0.5,1.5,-2\nbob,3,4,5e-3\n",
    "no header": "ann,0.5,1.5,-2\nbob,3,4,5e-3\n",
    "no header, numbers as ids": "17,0.5,1.5,-2\n4,3,4,5e-3\n",
    "byte order mark": "\ufeffuser_id,0,1,2\nann,0.5,1.5,-2\nbob,3,4,5e-3\n",
    "byte order mark, no header": "\ufeffann,0.5,1.5,-2\nbob,3,4,5e-3\n",
    "quotes": '"user_id","0","1","2"\r\n"ann",0.5,1.5,-2\r\n"bob",3,4,5e-3\r\n',
}
IDS = {"numbers as ids": ["0", "1"], "no header, numbers as ids": ["17", "4"]}
REFUSED = {
    "pandas, no ids": (",0,1,2\n0,0.5,1.5,-2\n1,3,4,5\n", "first column counts, .* write the frame with index=False"),
    "pandas, some rows, no ids": (",0,1,2\n3,0.5,1.5,-2\n9,3,4,5\n", "first column counts"),
    "no header, counted": ("0,0.5,1.5\n1,3,4\n", "first column counts"),
    "no header, counted from 1": ("1,0.5,1.5\n2,3,4\n", "first column counts"),
    "columns counted, none the id": ("0,1,2,3\n0.1,0.5,1.5,-2\n", "may be a header or a user's numbers"),
    "a header or a user": ("ann,0,1\nbob,0.5,1\n", "may be a header or a user's numbers"),
    "two ids": ("id,user_id,0\n5,ann,0.5\n", "its header names id and user_id"),
    "id by no known name, last": (
        "dim_0,dim_1,client\n0.5,1.5,101\n3,4,102\n",
        "first column, dim_0, is named like the",
    ),
    "two dimensions first": ("f0,f1,f2\n0.5,1.5,101\n", "first column, f0, is named like the numbers"),
    "another column": ("user_id,x0,x1,cluster\nann,0.5,1.5,7\n", "columns cluster are not named like"),
    "a name twice": ("user_id,0,0\nann,0.5,1\n", "neither a header nor an id and numbers"),
    "user_id as a user": ("user_id,0.5,1.5\nann,0.5,1\n", "neither a header nor an id and numbers"),
    "a name missing": ("user_id,0,,2\nann,0.5,1,2\n", "neither a header nor an id and numbers"),
    "an index that is none": (",user_id,0\n0.25,ann,0.5\n", "column 1 has no name and does not count rows"),
    "semicolons": ("user_id;0;1\nann;0,5;1\n", "one column"),
    "an open quote": ('user_id,"0\nann,1\n', ":1: not a line of a table"),
    "UTF-16": ("user_id,0\nann,1\n".encode("utf-16"), ":1: not a line of a table .* save the file as UTF-8"),
    "blank": ("\n\n", "one column"),
}


@pytest.mark.parametrize("form", READ)
def test_each_user_gets_their_own_vector(tmp_path: Path, form: str) -> None:
    (tmp_path / "t.csv").write_text(READ[form], encoding="utf-8", newline="")
    table = load_table(str(tmp_path / "t.csv"))
    assert list(table.ids) == IDS.get(form, ["ann", "bob"])
    expected = np.array([[0.5, 1.5, -2], [3, 4, 5e-3]], np.float32)
    np.testing.assert_array_equal(table.lookup(list(table.ids), ["", ""]), expected)


@pytest.mark.parametrize("form", REFUSED)
def test_what_can_be_read_in_two_ways_is_refused(tmp_path: Path, form: str) -> None:
    content, message = REFUSED[form]
    (tmp_path / "t.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=rf"t\.csv:?.*{message}") as caught:
        load_table(str(tmp_path / "t.csv"))
    assert "\n" not in str(caught.value)
