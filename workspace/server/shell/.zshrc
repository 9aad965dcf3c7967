# Start-up file of the zsh that `inv shell` starts: the user's own, then the prompt.
ZDOTDIR=$_inv_own
unset _inv_shell _inv_own
if [[ -r $ZDOTDIR/.zshrc ]]; then source "$ZDOTDIR/.zshrc"; fi
PROMPT="(vllm) $PROMPT"
