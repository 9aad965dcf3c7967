# Read first by the zsh that `inv shell` starts, whose ZDOTDIR is this folder: the user's own file,
# which may name another folder for the others.
_inv_shell=$ZDOTDIR
ZDOTDIR=${VLLM_WORKSPACE_ZDOTDIR:-$HOME}
unset VLLM_WORKSPACE_ZDOTDIR
if [[ -r $ZDOTDIR/.zshenv ]]; then source "$ZDOTDIR/.zshenv"; fi
_inv_own=$ZDOTDIR
ZDOTDIR=$_inv_shell
