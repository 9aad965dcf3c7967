from types import SimpleNamespace

nvidia = SimpleNamespace(
    ptxas=SimpleNamespace(path="ptxas"), ptxas_blackwell=SimpleNamespace(path="ptxas-blackwell")
)
