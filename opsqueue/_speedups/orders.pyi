class Orders:
    now_ms: int
    available: int
    refusal: str
    selecting: int
    limits_waited: int
    ranking_count: int
    building: int
    def __init__(self, random: int) -> None: ...
