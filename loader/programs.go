package loader

import (
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
)

// loadPrograms loads the programs onto these maps, as many at a time as there are CPUs: the
// kernel verifies each for itself, and that is nearly all of the time.
func loadPrograms(specs map[string]*ebpf.ProgramSpec, tables map[string]*ebpf.Map) (map[string]*ebpf.Program, error) {
	// The longest first, so that none is left to verify alone at the end.
	names := slices.SortedFunc(maps.Keys(specs), func(a, b string) int {
		return cmp.Or(cmp.Compare(len(specs[b].Instructions), len(specs[a].Instructions)), cmp.Compare(a, b))
	})
	var (
		wait  sync.WaitGroup
		mutex sync.Mutex
		next  int
		errs  []error
		progs = make(map[string]*ebpf.Program, len(names))
	)
	for range min(len(names), runtime.GOMAXPROCS(0)) {
		wait.Go(func() {
			for {
				mutex.Lock()
				if next == len(names) || len(errs) > 0 {
					mutex.Unlock()
					return
				}
				name := names[next]
				next++
				mutex.Unlock()
				program, err := loadProgram(name, specs[name], tables)
				mutex.Lock()
				if err != nil {
					errs = append(errs, err)
				} else {
					progs[name] = program
				}
				mutex.Unlock()
			}
		})
	}
	wait.Wait()
	if len(errs) > 0 {
		(&objects{progs: progs}).close()
		return nil, errs[0]
	}
	return progs, nil
}

func loadProgram(name string, spec *ebpf.ProgramSpec, tables map[string]*ebpf.Map) (*ebpf.Program, error) {
	spec = spec.Copy()
	for i := range spec.Instructions {
		instruction := &spec.Instructions[i]
		if !instruction.IsLoadFromMap() || instruction.Reference() == "" {
			continue
		}
		m, ok := tables[instruction.Reference()]
		if !ok {
			return nil, fmt.Errorf("program %s: no map %s", name, instruction.Reference())
		}
		if err := instruction.AssociateMap(m); err != nil {
			return nil, fmt.Errorf("program %s: map %s: %w", name, instruction.Reference(), err)
		}
	}
	program, err := ebpf.NewProgram(spec)
	if err != nil {
		return nil, fmt.Errorf("program %s: %w", name, err)
	}
	return program, nil
}

// fingerprint is the same for programs that load as the same code. It says nothing of the
// kernel: pins do not outlive it.
func fingerprint(spec *ebpf.ProgramSpec) string {
	hash := sha256.New()
	fmt.Fprintf(hash, "%s %s %d %s\n", spec.Type, spec.AttachType, spec.Flags, spec.License)
	var line []byte
	for i := range spec.Instructions {
		instruction := &spec.Instructions[i]
		line = binary.NativeEndian.AppendUint16(line[:0], uint16(instruction.OpCode))
		line = append(line, byte(instruction.Dst), byte(instruction.Src))
		line = binary.NativeEndian.AppendUint16(line, uint16(instruction.Offset))
		line = binary.NativeEndian.AppendUint64(line, uint64(instruction.Constant))
		line = append(line, instruction.Reference()...)
		line = append(line, ' ')
		line = append(line, instruction.Symbol()...)
		line = append(line, '\n')
		hash.Write(line)
		if relocation := btf.CORERelocationMetadata(instruction); relocation != nil {
			io.WriteString(hash, relocation.String())
		}
	}
	return hex.EncodeToString(hash.Sum(nil)[:12])
}

// A buildID tells what the pinned programs were made from, by their names. It lies beside them and
// is exchanged with them: as names of empty directories, since bpffs has no files.
type buildID map[string]builtProgram

type builtProgram struct {
	id          ebpf.ProgramID
	fingerprint string
}

const buildDir = "build"

// writeBuild notes what programs pinned in dir were loaded from.
func writeBuild(dir string, spec *ebpf.CollectionSpec, progs map[string]*ebpf.Program) error {
	ids, err := programIDs(progs)
	if err != nil {
		return err
	}
	for name, id := range ids {
		path := filepath.Join(dir, buildDir, fmt.Sprintf("%s=%d-%s", name, id, fingerprint(spec.Programs[name])))
		if err := os.MkdirAll(path, 0o700); err != nil {
			return fmt.Errorf("note the build: %w", known(err))
		}
	}
	return nil
}

// readBuild answers what it can read: programs that it does not tell of are loaded again.
func readBuild(dir string) buildID {
	build := make(buildID)
	entries, _ := os.ReadDir(filepath.Join(dir, buildDir))
	for _, entry := range entries {
		name, rest, _ := strings.Cut(entry.Name(), "=")
		number, print, _ := strings.Cut(rest, "-")
		if id, err := strconv.ParseUint(number, 10, 32); err == nil {
			build[name] = builtProgram{ebpf.ProgramID(id), print}
		}
	}
	return build
}

// isOf says whether the pinned programs are all that loading the spec would give.
func (b buildID) isOf(spec *ebpf.CollectionSpec, progs map[string]*ebpf.Program) bool {
	ids, err := programIDs(progs)
	if err != nil {
		return false
	}
	for name, program := range spec.Programs {
		if id, have := ids[name]; !have || b[name] != (builtProgram{id, fingerprint(program)}) {
			return false
		}
	}
	return true
}

// openPrograms opens the pinned programs that are there. missing is the first one that is not:
// the instance was attached by another build, or its pins are damaged; attaching mends both.
func openPrograms(i Instance, p pins) (o *objects, missing error, err error) {
	spec, err := ownSpec()
	if err != nil {
		return nil, nil, fmt.Errorf("read datapath: %w", err)
	}
	o = &objects{progs: make(map[string]*ebpf.Program)}
	// Another build may have pinned others.
	names := make(map[string]bool)
	for name := range spec.Programs {
		names[name] = true
	}
	entries, _ := os.ReadDir(p.progs())
	for _, entry := range entries {
		if !entry.IsDir() {
			names[entry.Name()] = true
		}
	}
	for _, name := range slices.Backward(slices.Sorted(maps.Keys(names))) {
		program, err := ebpf.LoadPinnedProgram(filepath.Join(p.progs(), name), nil)
		switch {
		case err == nil:
			o.progs[name] = program
		case errors.Is(err, os.ErrPermission):
			o.close()
			return nil, nil, fmt.Errorf("%s: %w", i, known(err))
		case errors.Is(err, os.ErrNotExist) && optional(names, name):
		default:
			missing = noProgram(i, name, err)
		}
	}
	return o, missing, nil
}

func noProgram(i Instance, name string, err error) error {
	return fmt.Errorf("%s: %w: program %s: %w: run tcnat attach, which mends it", i, ErrCorrupt, name, err)
}
