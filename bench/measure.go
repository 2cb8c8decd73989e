package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// The two sides of a comparison.
const (
	ext4  = "ext4"
	mount = "mount"
)

var sides = [2]string{ext4, mount}

// A line is one raw row: one block of one side, or one other measurement.
type line struct {
	Time   string `json:"time"`
	Part   string `json:"part"` // head, speed, read, bytes, trace, process
	Device string `json:"device,omitempty"`
	Row    string `json:"row,omitempty"`
	Side   string `json:"side,omitempty"` // ext4 | mount
	Round  int    `json:"round,omitempty"`
	Pair   int    `json:"pair,omitempty"` // number of the pair in its round

	Ops      int     `json:"ops,omitempty"`
	Seconds  float64 `json:"seconds,omitempty"`
	Rate     float64 `json:"rate,omitempty"` // in Unit
	Unit     string  `json:"unit,omitempty"`
	P50      float64 `json:"p50_us,omitempty"`
	P99      float64 `json:"p99_us,omitempty"`
	Busy     int     `json:"busy,omitempty"`
	AgentCPU float64 `json:"agent_cpu_us,omitempty"` // an operation

	Requests map[string]int `json:"requests,omitempty"` // FUSE, by operation, all Ops together
	Flushes  map[string]int `json:"flushes,omitempty"`  // system calls, by file, all Ops together

	Bytes         int64 `json:"bytes,omitempty"`          // to the device, all Ops together
	DeviceFlushes int64 `json:"device_flushes,omitempty"` // flush requests to the device

	Value  float64 `json:"value,omitempty"` // process: in Unit
	Memory *struct {
		Anon  int64 `json:"anon"`
		File  int64 `json:"file"`
		Memfd int64 `json:"memfd"`
	} `json:"memory,omitempty"` // bytes

	Head map[string]string `json:"head,omitempty"`
}

// A bench is one run.
type bench struct {
	*plan
	out    *json.Encoder
	worker *worker
}

func (p *plan) measure(ctx context.Context) (err error) {
	if err := os.MkdirAll(p.results, 0o755); err != nil {
		return err
	}
	if err := os.RemoveAll(p.work); err != nil {
		return fmt.Errorf("%w: does an earlier run still have something mounted there?", err)
	}
	if err := os.MkdirAll(p.work, 0o755); err != nil {
		return err
	}
	base := filepath.Join(p.results, time.Now().Format("2006-01-02-150405")+"-"+p.device)
	raw, err := os.Create(base + ".jsonl")
	if err != nil {
		return err
	}
	defer raw.Close()
	b := &bench{plan: p, out: json.NewEncoder(raw)}
	if b.worker, err = startWorker(); err != nil {
		return err
	}
	defer b.worker.close()
	if err := b.head(ctx); err != nil {
		return err
	}
	start := time.Now()
	for _, part := range []struct {
		name string
		fn   func(context.Context) error
	}{{"speed", b.speed}, {"read", b.read}, {"bytes", b.bytes}, {"trace", b.trace}, {"process", b.process}} {
		if !p.has(part.name) {
			continue
		}
		if err := part.fn(ctx); err != nil {
			return fmt.Errorf("%s: %w; raw rows so far: %s", part.name, err, raw.Name())
		}
	}
	b.progress("took %s; raw rows: %s", time.Since(start).Round(time.Second), raw.Name())
	table, err := tableOf(raw.Name())
	if err != nil {
		return err
	}
	fmt.Print(table)
	return os.WriteFile(base+".md", []byte(table), 0o644)
}

func (b *bench) progress(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "bench: "+format+"\n", args...)
}

func (b *bench) emit(l line) error {
	l.Time = time.Now().UTC().Format(time.RFC3339)
	if l.Device == "" {
		l.Device = b.device
	}
	return b.out.Encode(l)
}

// head says where and of what the figures are.
func (b *bench) head(ctx context.Context) error {
	version, err := command(ctx, b.agent, "version")
	if err != nil {
		return err
	}
	version, _, _ = strings.Cut(version, "\n")
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		return err
	}
	d, err := newDevice(ctx, "disk", b.work, "where", 0, 0)
	if err != nil {
		return err
	}
	defer d.close()
	return b.emit(line{Part: "head", Head: map[string]string{
		"agent": version, "machine": machine(), "kernel": unix.ByteSliceToString(uts.Release[:]) + " " + runtime.GOARCH,
		"sqlite": b.worker.sqlite, "disk": d.describe(ctx), "date": time.Now().Format(time.DateOnly), "command": b.command,
		"rounds": fmt.Sprint(b.rounds), "flush": b.flush.String(), "db": fmt.Sprint(b.dbMB),
	}})
}

func machine() string {
	model := ""
	if b, err := os.ReadFile("/proc/device-tree/model"); err == nil {
		model = strings.TrimRight(string(b), "\x00\n")
	} else if b, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for text := range strings.Lines(string(b)) {
			if key, value, ok := strings.Cut(text, ":"); ok && strings.TrimSpace(key) == "model name" {
				model = strings.TrimSpace(value)
				break
			}
		}
	}
	return fmt.Sprintf("%s, %d CPUs, %.1f GB", model, runtime.NumCPU(), float64(fields("/proc/meminfo")["MemTotal"])/1e6)
}

// A pair of devices with an agent on the second.
type rig struct {
	dirs    map[string]string // where SQLite works, by side
	devices map[string]*device
	agent   *mounted
}

// newRig makes two devices of a kind and mounts the agent over the second.
func (b *bench) newRig(ctx context.Context, kind, extra string) (r *rig, err error) {
	r = &rig{dirs: map[string]string{}, devices: map[string]*device{}}
	defer func() {
		if err != nil {
			_ = r.close()
		}
	}()
	mb := 512
	if kind == "loop" {
		mb = 1536
	}
	for side, name := range map[string]string{ext4: "plain", mount: "agent"} {
		if r.devices[side], err = newDevice(ctx, kind, b.work, name, mb, b.flush); err != nil {
			return r, err
		}
	}
	plain := filepath.Join(r.devices[ext4].dir, "db")
	if err := os.MkdirAll(plain, 0o755); err != nil {
		return r, err
	}
	if err := os.Chown(plain, nobody, nobody); err != nil {
		return r, err
	}
	r.agent, err = startAgent(ctx, b.agent, b.work, filepath.Join(r.devices[mount].dir, "data"), extra)
	if err != nil {
		return r, err
	}
	r.dirs[ext4], r.dirs[mount] = plain, r.agent.dir
	return r, nil
}

func (r *rig) close() (err error) {
	if r.agent != nil {
		_, err = r.agent.stop()
	}
	for _, d := range r.devices {
		if d != nil {
			d.close()
		}
	}
	return err
}

// ask sends requests of one side and returns the last reply.
func (b *bench) ask(side string, requests ...request) (got reply, err error) {
	for _, r := range requests {
		r.Side = side
		if got, err = b.worker.do(r); err != nil {
			return got, err
		}
	}
	return got, nil
}

// begin makes a row's database and brings it to where all later transactions are
// alike: in WAL mode the WAL has been written to its full length once.
func (b *bench) begin(side, dir string, row testRow) error {
	path := row.base(dir)
	warm := request{Do: "tx", Batch: max(row.batch, 1), N: 20}
	if b.device == "slow" {
		warm.N = 4
	}
	if row.mode == "WAL" {
		warm.N = 1200 / warm.Batch * min(warm.Batch, 10)
	}
	_, err := b.ask(side,
		request{Do: "drop", Path: path}, request{Do: "open", Path: path, Mode: row.mode},
		request{Do: "exec", SQL: "PRAGMA synchronous=NORMAL"}, warm,
		request{Do: "exec", SQL: "PRAGMA synchronous=" + row.sync}, request{Do: "tx", Batch: warm.Batch, N: 3})
	return err
}

func (b *bench) end(side, dir string, row testRow) error {
	_, err := b.ask(side, request{Do: "close"}, request{Do: "drop", Path: row.base(dir)})
	return err
}

// speed measures the rows that write.
func (b *bench) speed(ctx context.Context) error {
	r, err := b.newRig(ctx, b.device, "")
	if err != nil {
		return err
	}
	err = b.eachRound(ctx, "speed", r, chosen(writeRows(), b.only), func(row testRow, round int) error {
		for _, side := range sides {
			if err := b.begin(side, r.dirs[side], row); err != nil {
				return err
			}
		}
		err := b.inTurn(row, round, r, func(side string) (line, error) {
			got, err := b.ask(side, request{Do: "tx", Batch: row.batch, For: b.block})
			return line{Part: "speed", Ops: got.Ops, Seconds: got.Seconds, P50: got.P50, P99: got.P99}, err
		})
		for _, side := range sides {
			err = errors.Join(err, b.end(side, r.dirs[side], row))
		}
		return err
	})
	return errors.Join(err, r.close())
}

// eachRound runs all rows once a round.
func (b *bench) eachRound(ctx context.Context, part string, _ *rig, rows []testRow, fn func(testRow, int) error) error {
	for round := 1; round <= b.rounds; round++ {
		b.progress("%s, round %d of %d", part, round, b.rounds)
		for _, row := range rows {
			if err := ctx.Err(); err != nil {
				return err
			}
			if err := fn(row, round); err != nil {
				return fmt.Errorf("%s: %w", row.name, err)
			}
		}
	}
	return nil
}

// inTurn measures pairs of blocks, each side first in every other pair.
func (b *bench) inTurn(row testRow, round int, r *rig, fn func(side string) (line, error)) error {
	for pair := 1; pair <= b.pairs; pair++ {
		for i := range sides {
			side := sides[(i+pair+round)%2]
			before := cpu(r.agent.pid())
			l, err := fn(side)
			if err != nil {
				return err
			}
			if side == mount && l.Ops > 0 {
				l.AgentCPU = float64((cpu(r.agent.pid()) - before).Nanoseconds()) / 1e3 / float64(l.Ops)
			}
			l.Row, l.Side, l.Round, l.Pair = row.name, side, round, pair
			if l.Unit == "" {
				l.Unit = row.unit
			}
			if l.Rate == 0 && l.Seconds > 0 {
				l.Rate = float64(l.Ops) / l.Seconds
			}
			if row.kind != "mixed" {
				if err := b.emit(l); err != nil {
					return err
				}
				continue
			}
			// One measurement, two rows: Value holds the readers' rate.
			reads := l
			reads.Row, reads.Unit, reads.Rate, reads.AgentCPU, reads.P50, reads.P99 = row.name+": reads", "reads/s", l.Value, 0, 0, 0
			reads.Value, l.Value, l.Row = 0, 0, row.name+": writes"
			if err := errors.Join(b.emit(l), b.emit(reads)); err != nil {
				return err
			}
		}
	}
	return nil
}

// read measures the rows that read a large database.
func (b *bench) read(ctx context.Context) (err error) {
	r, err := b.newRig(ctx, b.device, "")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.close()) }()
	rows := chosen(readRows(), b.only)
	for _, mode := range []string{"DELETE", "WAL"} {
		var mine []testRow
		for _, row := range rows {
			if row.mode == mode {
				mine = append(mine, row)
			}
		}
		if len(mine) == 0 {
			continue
		}
		for _, side := range sides {
			path := filepath.Join(r.dirs[side], "big-"+mode+".db")
			if _, err := b.ask(side, request{Do: "open", Path: path, Mode: mode},
				request{Do: "exec", SQL: "PRAGMA synchronous=NORMAL"}, request{Do: "fill", MB: min(b.dbMB, 100)}); err != nil {
				return err
			}
		}
		err := b.eachRound(ctx, "read "+mode, r, mine, func(row testRow, round int) error {
			return b.inTurn(row, round, r, func(side string) (line, error) { return b.readBlock(row, side) })
		})
		if err != nil {
			return err
		}
		for _, side := range sides {
			if _, err := b.ask(side, request{Do: "close"}, request{Do: "drop", Path: filepath.Join(r.dirs[side], "big-"+mode+".db")}); err != nil {
				return err
			}
		}
	}
	return nil
}

func (b *bench) readBlock(row testRow, side string) (line, error) {
	l := line{Part: "read"}
	var got reply
	var err error
	switch row.kind {
	case "read":
		got, err = b.ask(side, request{Do: "read", Conns: row.conns, For: b.block})
	case "mixed":
		// The WAL is long already, as in the rows that write.
		got, err = b.ask(side, request{Do: "tx", Batch: 1, N: 200}, request{Do: "mixed", Batch: 1, Conns: row.conns, For: b.block})
		if got.Seconds > 0 {
			l.Value = float64(got.Reads) / got.Seconds
		}
	case "scan-cold":
		if err := dropCaches(); err != nil {
			return l, err
		}
		got, err = b.ask(side, request{Do: "scan"})
	case "scan-warm":
		got, err = b.ask(side, request{Do: "scan"}, request{Do: "scan"})
	}
	l.Ops, l.Seconds, l.P50, l.P99, l.Busy = got.Ops, got.Seconds, got.P50, got.P99, got.Busy
	if strings.HasPrefix(row.kind, "scan") {
		l.Rate, l.Ops = float64(got.Ops)/1e6/got.Seconds, 1
	}
	return l, err
}

// settle waits until a side has nothing more to write, and brings it to the device.
func (b *bench) settle(side string, d *device) error {
	if side == mount {
		time.Sleep(1500 * time.Millisecond) // sync.flush is one second
	}
	return d.sync()
}

// bytes measures what reaches the device, on a loop device for each side.
func (b *bench) bytes(ctx context.Context) (err error) {
	r, err := b.newRig(ctx, "loop", "")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.close()) }()
	b.progress("bytes to the device")
	if err := b.turnRing(r); err != nil {
		return err
	}
	for _, row := range chosen(writeRows(), b.only) {
		n := b.bytesN
		if row.batch > 1 {
			n = max(n/5, 20)
		}
		if err := b.bytesOf(ctx, r, row, row.name, n); err != nil {
			return fmt.Errorf("%s: %w", row.name, err)
		}
	}
	if !b.long {
		return nil
	}
	// The ring has 64 MiB by default, and a record with its header takes about 3 KB.
	for _, row := range chosen(writeRows(), b.only) {
		if row.batch == 1 && row.sync == "FULL" && (row.mode == "DELETE" || row.mode == "WAL") {
			b.progress("bytes to the device, long: %s", row.name)
			if err := b.bytesOf(ctx, r, row, row.name+", with checkpoints and compaction", 50000); err != nil {
				return fmt.Errorf("%s: %w", row.name, err)
			}
		}
	}
	return nil
}

// turnRing writes as much as the log's ring holds: until then the log makes new
// segments, 4 MiB of zeros each, once in the life of a data folder.
func (b *bench) turnRing(r *rig) error {
	row := testRow{name: "ring", mode: "WAL", sync: "NORMAL", batch: 1000}
	if err := b.begin(mount, r.dirs[mount], row); err != nil {
		return err
	}
	if _, err := b.ask(mount, request{Do: "tx", Batch: row.batch, N: 2000}); err != nil {
		return err
	}
	return b.end(mount, r.dirs[mount], row)
}

func (b *bench) bytesOf(ctx context.Context, r *rig, row testRow, name string, n int) error {
	for _, side := range sides {
		if err := ctx.Err(); err != nil {
			return err
		}
		d := r.devices[side]
		if err := b.begin(side, r.dirs[side], row); err != nil {
			return err
		}
		if err := b.settle(side, d); err != nil {
			return err
		}
		before, err := d.written()
		if err != nil {
			return err
		}
		got, err := b.ask(side, request{Do: "tx", Batch: row.batch, N: n})
		if err != nil {
			return err
		}
		if err := b.settle(side, d); err != nil {
			return err
		}
		after, err := d.written()
		if err != nil {
			return err
		}
		if err := b.emit(line{Part: "bytes", Device: "loop", Row: name, Side: side, Ops: got.Ops, Seconds: got.Seconds,
			Bytes: after.bytes - before.bytes, DeviceFlushes: after.flushes - before.flushes}); err != nil {
			return err
		}
		if err := b.end(side, r.dirs[side], row); err != nil {
			return err
		}
	}
	return nil
}

// trace counts FUSE requests and flushes from outside. strace slows all down, so
// nothing is timed here.
func (b *bench) trace(ctx context.Context) (err error) {
	r, err := b.newRig(ctx, b.device, "")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.close()) }()
	b.progress("requests and flushes, under strace")
	count := func(name, side string, ask request) error {
		pid := b.worker.cmd.Process.Pid
		if side == mount {
			pid = r.agent.pid()
		}
		var got reply
		t, err := traced(ctx, pid, b.work, func() (err error) {
			got, err = b.ask(side, ask)
			return err
		})
		if err != nil {
			return err
		}
		return b.emit(line{Part: "trace", Row: name, Side: side, Ops: got.Ops, Seconds: got.Seconds, Requests: t.requests, Flushes: t.flushes})
	}
	for _, row := range chosen(writeRows(), b.only) {
		for _, side := range sides {
			if err := b.begin(side, r.dirs[side], row); err != nil {
				return fmt.Errorf("%s: %w", row.name, err)
			}
			if err := count(row.name, side, request{Do: "tx", Batch: row.batch, N: b.traceN}); err != nil {
				return fmt.Errorf("%s: %w", row.name, err)
			}
			if err := b.end(side, r.dirs[side], row); err != nil {
				return fmt.Errorf("%s: %w", row.name, err)
			}
		}
	}
	if b.device == "slow" {
		return nil
	}
	for _, row := range chosen(readRows(), b.only) {
		if row.kind != "read" {
			continue
		}
		path := row.base(r.dirs[mount])
		// The first look-ups fill the kernel's cache.
		if _, err := b.ask(mount, request{Do: "open", Path: path, Mode: row.mode}, request{Do: "fill", MB: 10},
			request{Do: "read", Conns: row.conns, N: 20000}); err != nil {
			return err
		}
		if err := count(row.name, mount, request{Do: "read", Conns: row.conns, N: 1000}); err != nil {
			return err
		}
		if _, err := b.ask(mount, request{Do: "close"}, request{Do: "drop", Path: path}); err != nil {
			return err
		}
	}
	return nil
}

// process measures the agent itself, built without the hub: memory, starts,
// context switches.
func (b *bench) process(ctx context.Context) (err error) {
	d, err := newDevice(ctx, "disk", b.work, "process", 0, 0)
	if err != nil {
		return err
	}
	defer d.close()
	data := filepath.Join(d.dir, "data")
	var m *mounted
	start := func() (err error) {
		m, err = startAgent(ctx, b.lean, b.work, data, "")
		return err
	}
	if err := start(); err != nil {
		return err
	}
	defer func() {
		if m != nil {
			_, stopErr := m.stop()
			err = errors.Join(err, stopErr)
		}
	}()
	b.progress("the agent's memory")
	remember := func(name string, have memory) error {
		l := line{Part: "process", Row: name, Unit: "MB", Value: mb(have.total())}
		l.Memory = &struct {
			Anon  int64 `json:"anon"`
			File  int64 `json:"file"`
			Memfd int64 `json:"memfd"`
		}{have.anon, have.file, have.memfd}
		return b.emit(l)
	}
	time.Sleep(2 * time.Second)
	if err := remember("memory, idle after the start", memoryOf(m.pid())); err != nil {
		return err
	}
	most := peak(m.pid())
	for _, row := range writeRows() {
		if err = b.begin(mount, m.dir, row); err == nil {
			_, err = b.ask(mount, request{Do: "tx", Batch: row.batch, For: b.block})
		}
		if err = errors.Join(err, b.end(mount, m.dir, row)); err != nil {
			break
		}
	}
	if err := errors.Join(err, remember("memory, largest under load", most())); err != nil {
		return err
	}
	time.Sleep(3 * time.Second)
	if err := remember("memory, after load", memoryOf(m.pid())); err != nil {
		return err
	}

	big := fmt.Sprintf("%d MB", b.dbMB)
	path := filepath.Join(m.dir, "big.db")
	if _, err := b.ask(mount, request{Do: "open", Path: path, Mode: "DELETE"}, request{Do: "fill", MB: b.dbMB}); err != nil {
		return err
	}
	time.Sleep(3 * time.Second)
	if err := remember("memory, with a database of "+big, memoryOf(m.pid())); err != nil {
		return err
	}
	b.progress("context switches for %s", b.idle)
	before := switches(m.pid())
	time.Sleep(b.idle)
	if err := b.emit(line{Part: "process", Row: "context switches, idle, no hub", Unit: "a second",
		Value: float64(switches(m.pid())-before) / b.idle.Seconds()}); err != nil {
		return err
	}
	most = peak(m.pid())
	_, err = b.ask(mount, request{Do: "exec", SQL: "VACUUM"})
	if err := errors.Join(err, remember("memory, largest in VACUUM of "+big, most())); err != nil {
		return err
	}

	b.progress("starts")
	if _, err := b.ask(mount, request{Do: "close"}); err != nil {
		return err
	}
	for round := 1; round <= b.rounds; round++ {
		for _, way := range []string{"a clean stop", "kill -9"} {
			// What the log holds behind the last checkpoint is what a start replays.
			if _, err := b.ask(mount, request{Do: "open", Path: path, Mode: "WAL"}, request{Do: "tx", Batch: 1, N: 2000},
				request{Do: "close"}); err != nil {
				return err
			}
			if way == "kill -9" {
				m.kill()
			} else if took, err := m.stop(); err != nil {
				return err
			} else if err := b.emit(line{Part: "process", Row: "stop, database of " + big, Unit: "ms", Round: round, Value: ms(took)}); err != nil {
				return err
			}
			m = nil
			if err := start(); err != nil {
				return err
			}
			if err := b.emit(line{Part: "process", Row: fmt.Sprintf("start after %s, database of %s", way, big), Unit: "ms", Round: round, Value: ms(m.ready)}); err != nil {
				return err
			}
		}
	}
	got, err := b.ask(mount, request{Do: "open", Path: path, Mode: "WAL"}, request{Do: "query", SQL: "PRAGMA integrity_check"})
	if err == nil && got.Text != "ok" {
		err = fmt.Errorf("integrity_check after the starts: %s", got.Text)
	}
	_, closeErr := b.ask(mount, request{Do: "close"})
	return errors.Join(err, closeErr)
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1e3 }
