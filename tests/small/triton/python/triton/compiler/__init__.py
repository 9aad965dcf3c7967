class ASTSource:
    def __init__(self, fn, signature, constexprs):
        self.fn, self.signature, self.constexprs = fn, signature, constexprs
