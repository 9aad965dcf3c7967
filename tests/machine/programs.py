"""Stand-ins for the programs that the doctor asks: nvidia-smi, and assemblers of two ages."""

SMI = """case "$*" in
*--query-gpu*) echo '{gpu}';;
*--query-compute-apps*) {apps};;
*-x*) {xml};;
esac"""
PTXAS = """if [ "$1" = --version ]; then
echo 'Cuda compilation tools, release {release}, V{release}.1'
exit
fi
target=${{1#--gpu-name=}}
case " {known} " in *" $target "*) printf '\\177ELF' > "$3"; grep -q "target $target" "$4";; *)
echo "ptxas fatal   : Value '$target' is not defined for option 'gpu-name'" >&2; exit 255;; esac"""
OLD, NEW = "sm_90a sm_100a sm_120a", "sm_90a sm_100a sm_120a sm_121a"
