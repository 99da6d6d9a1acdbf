"""What a dashboard's files hold, and tokens that would break pages which took them for markup."""

import json

EVIL = "<img src=x onerror=alert(1)>"
BREAKER = "</script><script>alert(2)</script>\u2028"


def read_data(folder):
    values = {}
    for path in folder.glob("*.js"):
        head, _, value = path.read_text().partition(" = ")
        values[path.stem] = json.loads(value.rstrip(";\n"))
    shards = [part for name, part in values.items() if name.startswith("latents-")]
    records = {int(latent): record for part in shards for latent, record in part.items()}
    return values["overview"], records
