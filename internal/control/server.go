package control

import (
	"archive/tar"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/litefs-agent/litefs-agent/ltx"
)

// Options say how a Server listens.
type Options struct {
	// Path of the socket, at most 103 bytes. Its folder is made where it is
	// missing. A socket that a dead service left is replaced; one at which
	// somebody answers is not.
	Path string
	// GID owns the socket, whose mode is 0660; -1 leaves the process's group.
	GID int
	Log *slog.Logger // nil discards
}

// A Server is a listening control socket.
type Server struct {
	service  Service
	log      *slog.Logger
	path     string
	listener net.Listener
	socket   os.FileInfo // the socket we made, so that Close removes no other
	close    sync.Once
}

// Listen makes the socket. From its return on clients can connect; they are
// answered once Run is called.
func Listen(service Service, opts Options) (*Server, error) {
	log := opts.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	listener, socket, err := listenUnix(opts.Path, opts.GID)
	if err != nil {
		return nil, fmt.Errorf("control socket %s: %w", opts.Path, err)
	}
	return &Server{service: service, log: log, path: opts.Path, listener: listener, socket: socket}, nil
}

// listenUnix binds in a private folder beside path and renames, so that nobody
// ever finds the socket with rights other than its final ones. That two services
// do not start at once, the lock of the data folder ensures.
func listenUnix(path string, gid int) (net.Listener, os.FileInfo, error) {
	if info, err := os.Lstat(path); err == nil && info.Mode().Type() != os.ModeSocket {
		return nil, nil, errors.New("is there already and no socket: remove it, or set [status] socket to another path")
	}
	if conn, err := net.DialTimeout("unix", path, time.Second); err == nil {
		conn.Close()
		return nil, nil, errors.New("another service answers there: stop it, or set [status] socket to another path")
	} else if !errors.Is(err, os.ErrNotExist) && !errors.Is(err, syscall.ECONNREFUSED) {
		return nil, nil, err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, nil, err
	}
	private, err := os.MkdirTemp(filepath.Dir(path), ".")
	if err != nil {
		return nil, nil, err
	}
	defer os.RemoveAll(private)
	temp := filepath.Join(private, "s")
	listener, err := net.Listen("unix", temp)
	if err != nil {
		return nil, nil, err
	}
	listener.(*net.UnixListener).SetUnlinkOnClose(false) // it would remove temp
	var socket os.FileInfo
	err = os.Chmod(temp, 0o660)
	if err == nil && gid >= 0 {
		err = os.Chown(temp, -1, gid)
	}
	if err == nil {
		socket, err = os.Lstat(temp)
	}
	if err == nil {
		err = os.Rename(temp, path)
	}
	if err != nil {
		listener.Close()
		return nil, nil, err
	}
	return listener, socket, nil
}

// Run answers until ctx ends; then it ends the requests that still run, removes
// the socket and returns nil. It is called at most once.
func (s *Server) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	server := &http.Server{
		Handler:           s.handler(),
		ReadHeaderTimeout: 10 * time.Second,
		IdleTimeout:       time.Minute,
		BaseContext:       func(net.Listener) context.Context { return ctx },
		ErrorLog:          slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
	}
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		<-ctx.Done()
		// The requests saw ctx end; one that does not return is cut.
		grace, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		if server.Shutdown(grace) != nil {
			server.Close()
		}
	}()
	err := server.Serve(s.listener)
	cancel()
	<-stopped
	s.Close()
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return fmt.Errorf("control socket %s: %w", s.path, err)
}

// Close removes the socket of a server that was never run, or of one that has
// ended.
func (s *Server) Close() {
	s.close.Do(func() {
		s.listener.Close()
		if now, err := os.Lstat(s.path); err == nil && os.SameFile(now, s.socket) {
			os.Remove(s.path)
		}
	})
}

func (s *Server) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /status", s.status)
	mux.HandleFunc("GET /wait", s.wait)
	mux.HandleFunc("GET /export", s.export)
	mux.HandleFunc("POST /import", s.importDB)
	mux.HandleFunc("POST /verify", s.verify)
	mux.HandleFunc("GET /ltx", s.exportLTX)
	mux.HandleFunc("GET /events", s.events)
	mux.HandleFunc("GET /nodes", s.nodes(func(ctx context.Context, keeper NodeKeeper, _ url.Values) (any, error) {
		return keeper.Nodes(ctx)
	}))
	mux.HandleFunc("POST /nodes/accept", s.nodes(func(ctx context.Context, keeper NodeKeeper, query url.Values) (any, error) {
		return keeper.AcceptNode(ctx, query.Get("node"), query.Get("hardware"))
	}))
	return mux
}

func (s *Server) status(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	if err := json.NewEncoder(w).Encode(s.service.Status(r.Context())); err != nil {
		s.log.Debug("status not sent", "err", err)
	}
}

// nodes answers what only a hub can.
func (s *Server) nodes(answer func(context.Context, NodeKeeper, url.Values) (any, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		keeper, ok := s.service.(NodeKeeper)
		if !ok {
			refuse(w, http.StatusBadRequest, errors.New("this service is a node: ask the hub, with --socket "+HubSocket))
			return
		}
		out, err := answer(r.Context(), keeper, r.URL.Query())
		if err != nil {
			refuse(w, statusOf(err), err)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		if err := json.NewEncoder(w).Encode(out); err != nil {
			s.log.Debug("answer not sent", "err", err)
		}
	}
}

func (s *Server) wait(w http.ResponseWriter, r *http.Request) {
	db, txid, acked, timeout, err := parseWait(r.URL.Query())
	if err != nil {
		refuse(w, http.StatusBadRequest, err)
		return
	}
	ctx := r.Context()
	if timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, timeout, ErrTimeout)
		defer cancel()
	}
	if err := s.service.Wait(ctx, db, txid, acked); err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		refuse(w, statusOf(err), err)
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

// parseWait reads the query of GET /wait.
func parseWait(query url.Values) (db string, txid ltx.TXID, acked bool, timeout time.Duration, err error) {
	if db = query.Get("db"); db == "" {
		return "", 0, false, 0, errors.New("db is missing")
	}
	if text := query.Get("txid"); text != "" {
		if txid, err = ltx.ParseTXID(text); err != nil {
			return "", 0, false, 0, err
		}
	}
	if text := query.Get("timeout"); text != "" {
		if timeout, err = time.ParseDuration(text); err != nil || timeout <= 0 {
			return "", 0, false, 0, fmt.Errorf("timeout %q: must be a duration such as 10s", text)
		}
	}
	return db, txid, query.Get("acked") == "1", timeout, nil
}

func (s *Server) export(w http.ResponseWriter, r *http.Request) {
	s.stream(w, r, "application/vnd.sqlite3", func(db string, body io.Writer) error {
		return s.service.Export(r.Context(), db, body)
	})
}

func (s *Server) importDB(w http.ResponseWriter, r *http.Request) {
	db := r.URL.Query().Get("db")
	if db == "" {
		refuse(w, http.StatusBadRequest, errors.New("db is missing"))
		return
	}
	if err := s.service.Import(r.Context(), db, r.Body); err != nil {
		refuse(w, statusOf(err), err)
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

func (s *Server) verify(w http.ResponseWriter, r *http.Request) {
	s.stream(w, r, "application/jsonl", func(db string, body io.Writer) error {
		lines := json.NewEncoder(body)
		var sendErr error
		err := s.service.Verify(r.Context(), db, func(check Check) {
			if sendErr == nil {
				sendErr = lines.Encode(check)
			}
			if sendErr == nil {
				sendErr = http.NewResponseController(w).Flush()
			}
		})
		return errors.Join(err, sendErr)
	})
}

func (s *Server) events(w http.ResponseWriter, r *http.Request) {
	s.stream(w, r, "application/jsonl", func(db string, body io.Writer) error {
		body.(*streamBody).begin() // the client may wait for it before it does something
		rc := http.NewResponseController(w)
		if err := rc.Flush(); err != nil {
			return err
		}
		lines := json.NewEncoder(body)
		return s.service.Events(r.Context(), db, func(e Event) error {
			// Who takes nothing for so long is cut: its socket's buffer is full.
			if err := rc.SetWriteDeadline(time.Now().Add(eventsPatience)); err != nil {
				return err
			}
			return errors.Join(lines.Encode(e), rc.Flush())
		})
	})
}

// eventsPatience is how long a reader of events may take nothing.
const eventsPatience = 5 * time.Minute

func (s *Server) exportLTX(w http.ResponseWriter, r *http.Request) {
	s.stream(w, r, "application/x-tar", func(db string, body io.Writer) error {
		files := tar.NewWriter(body)
		err := s.service.ExportLTX(r.Context(), db, func(name string, size int64) (io.Writer, error) {
			return files, files.WriteHeader(&tar.Header{Name: name, Size: size, Mode: 0o644})
		})
		if err != nil {
			return err
		}
		return files.Close()
	})
}

// stream answers with what produce writes, and the trailer. An error before the
// first byte is a refusal.
func (s *Server) stream(w http.ResponseWriter, r *http.Request, contentType string, produce func(db string, body io.Writer) error) {
	db := r.URL.Query().Get("db")
	if db == "" && r.URL.Path != "/verify" && r.URL.Path != "/events" {
		refuse(w, http.StatusBadRequest, errors.New("db is missing"))
		return
	}
	body := &streamBody{w: w, contentType: contentType}
	if err := produce(db, body); err != nil {
		if r.Context().Err() != nil {
			err = context.Cause(r.Context())
		}
		if !body.begun {
			refuse(w, statusOf(err), err)
			return
		}
		w.Header().Set(resultTrailer, headerText(err.Error()))
		return
	}
	body.begin()
	w.Header().Set(resultTrailer, resultOK)
}

// headerText makes text fit for a header: one line, and never "ok".
func headerText(text string) string {
	return "error: " + url.PathEscape(text)
}

// A streamBody sends the headers with its first byte.
type streamBody struct {
	w           http.ResponseWriter
	contentType string
	begun       bool
}

func (b *streamBody) begin() {
	if !b.begun {
		b.begun = true
		b.w.Header().Set("Content-Type", b.contentType)
		b.w.Header().Set("Trailer", resultTrailer)
		b.w.WriteHeader(http.StatusOK)
	}
}

func (b *streamBody) Write(p []byte) (int, error) {
	b.begin()
	return b.w.Write(p)
}

// refusal is the JSON of a refused request.
type refusal struct {
	Error string `json:"error"`
}

func refuse(w http.ResponseWriter, status int, err error) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	json.NewEncoder(w).Encode(refusal{err.Error()}) // an error here means that nobody listens any more
}

// statusOf gives the status code of a service's error; Client.refused is its
// other side.
func statusOf(err error) int {
	switch {
	case errors.Is(err, ErrNoDatabase):
		return http.StatusNotFound
	case errors.Is(err, ErrTimeout):
		return http.StatusGatewayTimeout
	case errors.Is(err, context.Canceled): // the service stops, or the client has gone
		return http.StatusServiceUnavailable
	}
	return http.StatusInternalServerError
}
